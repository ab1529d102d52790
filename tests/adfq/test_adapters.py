"""An adapted model computes what it did, and its sites and norms are the right ones."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, GatedMlp, Mlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from adfq import AdfqError, adapters
from adfq.adapters import adapt, timm_swin, timm_vit

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


class GatedAttention(Attention):
    """timm's Attention with its gate, as some of its models have it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"gated": True}))


VITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"cls": VisionTransformerDistilled},
    "qk norm, LayerScale, registers": {"qk_norm": True, "init_values": 0.5, "reg_tokens": 3},
    "scale norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "average pool, no class token": {"global_pool": "avg", "class_token": False},
    "map pool": {"global_pool": "map", "class_token": False},
    "patch refinement": {"global_pool": "prr"},
    "pre-norm": {"pre_norm": True},
    "no head": {"num_classes": 0},
    "SwiGLU": {"mlp_layer": SwiGLUPacked},
    "SwiGLU of two layers": {"mlp_layer": SwiGLU, "scale_mlp_norm": True},
    "gated MLP": {"mlp_layer": GatedMlp},
    "parallel blocks": {"block_fn": ParallelThingsBlock, "init_values": 0.5},
    "post-norm": {"block_fn": ResPostBlock},
    "gated attention": {"attn_layer": GatedAttention},
    "any image size": {"dynamic_img_size": True},
}
SWINS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows that do not divide the map": {"img_size": 40, "window_size": 8},
    "odd maps": {"img_size": 36, "window_size": 7},
    "no biases": {"qkv_bias": False},
    "no head": {"num_classes": 0},
    "any image size": {"strict_img_size": False, "always_partition": True},
}
MODELS = [("ViT", name) for name in VITS] + [("Swin", name) for name in SWINS]
every_model = pytest.mark.parametrize("which", MODELS, ids=lambda which: ": ".join(which))


@pytest.fixture
def make(make_vit: MakeModel, make_swin: MakeModel) -> Callable[[tuple[str, str]], nn.Module]:
    def build(which: tuple[str, str]) -> nn.Module:
        family, name = which
        return make_vit(**VITS[name]) if family == "ViT" else make_swin(**SWINS[name])

    return build


def images_for(which: tuple[str, str], make_images: MakeImages) -> Tensor:
    return make_images(size=SWINS[which[1]].get("img_size", 32) if which[0] == "Swin" else 32)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1  # else the tolerance would forgive too much
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- the function ---------------------------------------------------------------------------------------------------


@every_model
def test_an_adapted_model_computes_what_it_did(
    which: tuple[str, str], make: Callable[[tuple[str, str]], nn.Module], make_images: MakeImages
) -> None:
    model, images = make(which), images_for(which, make_images)
    with torch.no_grad():
        expected = model(images)
        assert_same(adapt(model).model(images), expected)


@every_model
def test_adapting_keeps_the_parameters(which: tuple[str, str], make: Callable[[tuple[str, str]], nn.Module]) -> None:
    model = make(which)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = adapt(model).model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("training", [True, False])
def test_the_new_modules_are_in_the_models_mode(training: bool, make_vit: MakeModel, make_swin: MakeModel) -> None:
    """A mixed tree is what exporters warn of, and what dropout would go by."""
    for model in (make_vit().train(training), make_swin().train(training)):
        assert {module.training for module in adapt(model).model.modules()} == {training}


def test_swin_windows_are_shifted_and_masked_in_these_tests(make_swin: MakeModel) -> None:
    blocks = [block for stage in make_swin().get_submodule("layers") for block in stage.blocks]
    assert [any(block.shift_size) for block in blocks] == [False, True, False, True]
    assert [block.attn_mask is not None for block in blocks] == [False, True, False, True]


def test_another_image_size_than_the_models(make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages) -> None:
    for model in (make_vit(dynamic_img_size=True), make_swin(**SWINS["any image size"])):
        images = make_images(size=48)
        with torch.no_grad():
            expected = model(images)
            assert_same(adapt(model).model(images), expected)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.rand(17, 17).sub_(0.5).mul_(4)}])
def test_attention_masks_are_obeyed(options: dict[str, Any], make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images()
    with torch.no_grad():
        plain, expected = model.forward_features(images), model.forward_features(images, **options)
        assert not torch.allclose(plain, expected, rtol=1e-2)
        assert_same(adapt(model).model.forward_features(images, **options), expected)


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "vit_small_patch16_18x2_224", "vit_base_patch16_siglip_224"]
)
def test_models_of_timms_registry(name: str, randomize: Callable[[nn.Module], nn.Module]) -> None:
    model = randomize(timm.create_model(name, img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=10))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        assert_same(adapt(model).model(images), expected)


def test_gradients_flow_through_an_adapted_model(make_swin: MakeModel, make_images: MakeImages) -> None:
    model = adapt(make_swin()).model
    model(make_images()).square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


# --- the sites ------------------------------------------------------------------------------------------------------


def roles_of(model: nn.Module) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    network = adapt(model)
    weights = Counter(layer.role for _, layer in network.weight_layers())
    return weights, Counter(matmul.roles for _, matmul in network.matmuls())


@pytest.mark.parametrize(
    ("options", "weights", "attentions"),
    [
        ({}, {"patch_embed": 1, "qkv": 2, "proj": 2, "fc1": 2, "fc2": 2, "head": 1}, 2),
        ({"depth": 5}, {"patch_embed": 1, "qkv": 5, "proj": 5, "fc1": 5, "fc2": 5, "head": 1}, 5),
        (VITS["distilled"], {"patch_embed": 1, "qkv": 2, "proj": 2, "fc1": 2, "fc2": 2, "head": 2}, 2),
        (VITS["no head"], {"patch_embed": 1, "qkv": 2, "proj": 2, "fc1": 2, "fc2": 2}, 2),
        (VITS["parallel blocks"], {"patch_embed": 1, "qkv": 4, "proj": 4, "fc1": 4, "fc2": 4, "head": 1}, 4),
        (VITS["SwiGLU"], {"patch_embed": 1, "qkv": 2, "proj": 2, "fc1": 2, "gated": 2, "head": 1}, 2),
        (VITS["SwiGLU of two layers"], {"patch_embed": 1, "qkv": 2, "proj": 2, "fc1": 4, "gated": 2, "head": 1}, 2),
        (VITS["scale norms"], {"patch_embed": 1, "qkv": 2, "proj": 2, "fc1": 2, "hidden": 2, "head": 1}, 2),
        (VITS["post-norm"], {"patch_embed": 1, "residual": 4, "proj": 2, "fc2": 2, "head": 1}, 2),
        (VITS["gated attention"], {"patch_embed": 1, "qkv": 4, "proj": 2, "fc1": 2, "fc2": 2, "head": 1}, 2),
        (VITS["map pool"], {"patch_embed": 1, "qkv": 2, "in_proj": 2, "proj": 3, "fc1": 3, "fc2": 3, "head": 1}, 3),
        (VITS["patch refinement"], {"patch_embed": 1, "qkv": 2, "proj": 2, "fc1": 2, "fc2": 2, "head": 1}, 3),
    ],
)
def test_roles_of_a_vit(options: dict[str, Any], weights: dict[str, int], attentions: int, make_vit: MakeModel) -> None:
    expected = {("query", "key"): attentions, ("probs", "value"): attentions}
    assert roles_of(make_vit(**options)) == (weights, expected)


def test_roles_of_a_swin(make_swin: MakeModel) -> None:
    weights = {"patch_embed": 1, "qkv": 4, "proj": 4, "fc1": 4, "fc2": 4, "reduction": 1, "head": 1}
    assert roles_of(make_swin()) == (weights, {("query", "key"): 4, ("probs", "value"): 4})
    del weights["head"]
    assert roles_of(make_swin(num_classes=0))[0] == weights


def test_roles_belong_to_the_layers_of_that_name(make_vit: MakeModel, make_swin: MakeModel) -> None:
    for model in (make_vit(), make_swin()):
        for name, layer in adapt(model).weight_layers():
            assert layer.role in name  # timm's names have them: blocks.0.attn.qkv, layers.1.downsample.reduction …


def test_operands_are_what_their_roles_say(make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages) -> None:
    for model in (make_vit(), make_swin()):
        matmuls = [matmul for _, matmul in adapt(model).matmuls()]
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for matmul in matmuls:
            matmul.register_forward_pre_hook(seen.__setitem__)
        model(make_images())
        for matmul in matmuls:
            left, right = seen[matmul]
            if matmul.roles == ("probs", "value"):
                torch.testing.assert_close(left.sum(-1), torch.ones(left.shape[:-1]))
                assert right.shape[-2] == left.shape[-1]  # tokens × channels
            else:
                assert left.shape == right.shape


@pytest.mark.parametrize(
    ("activation", "role"),
    [
        ("gelu", "fc2"),
        ("gelu_tanh", "fc2"),
        ("quick_gelu", "fc2"),
        ("silu", "fc2"),
        ("relu", "relu"),
        ("tanh", "hidden"),
        ("leaky_relu", "hidden"),
    ],
)
def test_the_role_behind_an_activation_function(activation: str, role: str, make_vit: MakeModel) -> None:
    layers = dict(adapt(make_vit(act_layer=activation, global_pool="map")).weight_layers())
    assert [layers[f"{name}.fc2"].role for name in ("blocks.0.mlp", "attn_pool.mlp")] == [role] * 2


def test_layers_without_a_rule_are_reported(make_vit: MakeModel) -> None:
    assert adapt(make_vit()).unsupported == ()
    left = tuple(f"blocks.{block}.mlp.{layer}" for block in range(2) for layer in ("fc1", "fc2"))
    assert adapt(make_vit(**VITS["gated MLP"])).unsupported == left


# --- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "distilled", "qk norm, LayerScale, registers", "SwiGLU"])
def test_norms_of_a_vit(name: str, make_vit: MakeModel) -> None:
    network = adapt(make_vit(**VITS[name]))
    expected = {}
    for index in range(2):
        expected[f"blocks.{index}.attn.qkv"] = network.model.get_submodule(f"blocks.{index}.norm1")
        expected[f"blocks.{index}.mlp.fc1"] = network.model.get_submodule(f"blocks.{index}.norm2")
    assert dict(network.input_norms) == expected


def test_norms_of_parallel_blocks(make_vit: MakeModel) -> None:
    network = adapt(make_vit(**VITS["parallel blocks"]))
    expected = {}
    for index in range(2):
        for branch in range(2):
            for name in (f"blocks.{index}.attns.{branch}.attn.qkv", f"blocks.{index}.ffns.{branch}.mlp.fc1"):
                expected[name] = network.model.get_submodule(f"{name.rsplit('.', 2)[0]}.norm")
    assert dict(network.input_norms) == expected


def test_norms_of_a_swin(make_swin: MakeModel) -> None:
    network = adapt(make_swin())
    expected = {"layers.1.downsample.reduction": network.model.get_submodule("layers.1.downsample.norm")}
    for stage in range(2):
        for index in range(2):
            block = f"layers.{stage}.blocks.{index}"
            expected[f"{block}.attn.qkv"] = network.model.get_submodule(f"{block}.norm1")
            expected[f"{block}.mlp.fc1"] = network.model.get_submodule(f"{block}.norm2")
    assert dict(network.input_norms) == expected


def test_a_gate_reads_the_norm_too(make_vit: MakeModel) -> None:
    network = adapt(make_vit(**VITS["gated attention"]))
    norm = network.model.get_submodule("blocks.0.norm1")
    assert [name for name, found in network.input_norms.items() if found is norm] == [
        "blocks.0.attn.qkv",
        "blocks.0.attn.gate",
    ]


def test_the_norm_of_attention_pooling(make_vit: MakeModel) -> None:
    network = adapt(make_vit(**VITS["map pool"]))
    assert network.input_norms["attn_pool.mlp.fc1"] is network.model.get_submodule("attn_pool.norm")
    assert network.units[-2:] == ("attn_pool", "head")


def test_post_norm_blocks_have_no_pairs(make_vit: MakeModel) -> None:
    assert adapt(make_vit(**VITS["post-norm"])).input_norms == {}


def test_a_norm_that_is_no_layernorm_is_no_pair(make_vit: MakeModel, make_swin: MakeModel) -> None:
    assert adapt(make_vit(norm_layer=RmsNorm)).input_norms == {}
    assert adapt(make_swin(norm_layer=RmsNorm)).input_norms == {}


@every_model
def test_scales_can_be_exchanged_within_each_pair(
    which: tuple[str, str], make: Callable[[tuple[str, str]], nn.Module], make_images: MakeImages
) -> None:
    """The exchange works only if the linear layers are the only readers of the norm's output."""
    model, images = make(which), images_for(which, make_images)
    with torch.no_grad():
        expected = model(images)
        network = adapt(model)
        factors = {norm: 0.5 + torch.rand(norm.weight.shape) for norm in network.input_norms.values()}
        for norm, factor in factors.items():
            norm.weight.mul_(factor)
            if norm.bias is not None:
                norm.bias.mul_(factor)
        for name, norm in network.input_norms.items():
            network.model.get_submodule(name).weight.div_(factors[norm])
        assert_same(network.model(images), expected)


# --- what is not supported ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_other", [lambda: nn.Linear(3, 3), lambda: timm.create_model("resnet18"), lambda: nn.Sequential()]
)
def test_a_model_of_another_family(make_other: Callable[[], nn.Module]) -> None:
    model = make_other()
    with pytest.raises(AdfqError, match=rf"cannot quantize a {type(model).__name__};.*SwinTrans.*VisionTransformer"):
        adapt(model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_fn": ParallelScalingBlock}, r"blocks\.0: .*ParallelScalingBlock"),
        ({"attn_layer": "diff"}, r"blocks\.0: .*Block.* attention"),
    ],
)
def test_a_vit_with_another_kind_of_attention(options: dict[str, Any], says: str, make_vit: MakeModel) -> None:
    with pytest.raises(AdfqError, match=says):
        adapt(make_vit(**options))


class SharpenedAttention(Attention):
    """Computes something else than the class that it derives from; a replacement would drop that."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(3 * x, attn_mask, is_causal)


def test_attention_with_a_forward_of_its_own_is_not_silently_replaced(make_vit: MakeModel) -> None:
    with pytest.raises(AdfqError, match=r"blocks\.0.*SharpenedAttention"):
        adapt(make_vit(attn_layer=SharpenedAttention))


def test_a_subclass_of_a_supported_model(make_vit: MakeModel, make_images: MakeImages) -> None:
    class Doubled(VisionTransformer):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            return 2 * super().forward(x)

    model, images = make_vit(Doubled), make_images()
    expected = model(images)
    assert_same(adapt(model).model(images), expected)


def test_an_adapted_model_is_not_adapted_again(make_vit: MakeModel, make_swin: MakeModel) -> None:
    for model in (make_vit(), make_swin()):
        with pytest.raises(AdfqError, match=r"patch_embed\.proj: .*QuantConv2d"):
            adapt(adapt(model).model)


def test_convolutional_mlps_are_quantized_or_reported(make_vit: MakeModel) -> None:
    network = adapt(make_vit(mlp_layer=lambda **kwargs: Mlp(**kwargs, use_conv=True)))
    assert [layer.role for _, layer in network.weight_layers()].count("fc1") == 2
    assert network.unsupported == ()


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_of_timm_leave_out_what_is_refused() -> None:
    names = [name for module in (timm_vit, timm_swin) for name in module.model_names()]
    assert {"vit_small_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"} <= set(names)
    assert "vit_base_patch16_xp_224" not in names
    for refused in ("vit_pwee_patch16_reg1_gap_256", "vit_dlittle_patch16_reg1_gap_256"):
        assert refused not in names
        with pytest.raises(AdfqError, match="cannot quantize"), torch.device("meta"):
            adapt(timm.create_model(refused, depth=1))


def test_an_adapter_whose_framework_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("a.Model", "not_installed_framework", adapters.ENTRY_POINT_GROUP)
    monkeypatch.setattr(adapters, "entry_points", lambda **_: [point])
    with pytest.raises(AdfqError, match=r"adapter for a\.Model cannot be imported: No module named"):
        adapters.find_adapter("a.Model")
