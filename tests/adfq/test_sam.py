"""Segment Anything and MobileSAM: adapted, they compute the same; every method quantizes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adfq
from adfq import AdfqError
from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.layers import QuantMatMul, QuantWeightLayer
from adfq.method import Run
from adfq.quantizers import PerPatchOutlierQuantizer, RunTimePatchOutlierQuantizer
from adfq.registry import create_method, methods

pytest.importorskip("segment_anything")

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom

from adfq.adapters.mobile_sam import MobileSamEncoder
from adfq.adapters.sam import QuantEncoderAttention, decode, segment_densely

Randomize = Callable[[nn.Module], nn.Module]
KINDS = ["vit", "tiny_vit"]
FAST = ("base_ptq", "repq_vit", "adfq_vit", "row_ridge")  # of all combinations, in the fast suite
SIZE = 64  # 8×8 tokens of 8 pixels, or 4×4 of 16, which no window fills
WIDTH = 16


def make_sam(kind: str) -> nn.Module:
    encoder: Any = (
        ImageEncoderViT(
            img_size=SIZE,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=3,
            mlp_ratio=2,
            out_chans=WIDTH,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        )
        if kind == "vit"
        else MobileSamEncoder(SIZE, (8, 16, 16, 24), (1, 1, 1, 1), (2, 2, 2, 3), (3, 3, 3, 3), WIDTH)
    )
    side = SIZE // (8 if kind == "vit" else 16)
    decoder = MaskDecoder(
        transformer_dim=WIDTH,
        transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, num_heads=2, mlp_dim=32),
        iou_head_hidden_dim=WIDTH,
    )
    return Sam(encoder, PromptEncoder(WIDTH, (side, side), (SIZE, SIZE), mask_in_chans=8), decoder)


@pytest.fixture(params=KINDS)
def sam(request: pytest.FixtureRequest, randomize: Randomize) -> nn.Module:
    return randomize(make_sam(request.param))


@pytest.fixture
def vit_sam(randomize: Randomize) -> nn.Module:
    return randomize(make_sam("vit"))


def draw(count: int = 2, filled: int = SIZE) -> Tensor:
    """Images as Sam preprocesses them: padded at the bottom."""
    images = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    images[:, :, filled:] = 0
    return images


def ask(sam: Any, image: Tensor) -> list[Tensor]:
    """Return the outputs of segment_anything's own forward pass for a box, and for a point."""
    record = {"image": image, "original_size": (SIZE, SIZE)}
    by_box = sam([{**record, "boxes": torch.tensor([[4.0, 8.0, 40.0, 50.0]])}], multimask_output=False)
    point = {"point_coords": torch.tensor([[[20.0, 30.0]]]), "point_labels": torch.ones(1, 1)}
    by_point = sam([{**record, **point}], multimask_output=True)
    return [output[key] for (output,) in (by_box, by_point) for key in ("low_res_logits", "iou_predictions")]


@torch.no_grad()
def test_an_adapted_sam_computes_the_same(sam: nn.Module) -> None:
    image = 40 * draw(1)[0] + 120
    expected = ask(sam, image)
    for output, other in zip(ask(adapt(copy.deepcopy(sam)).model, image), expected, strict=True):
        torch.testing.assert_close(output, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_adapted_encoder_computes_the_same(sam: Any) -> None:
    images = draw()
    (found,) = adapt(copy.deepcopy(sam.image_encoder)).run(images)
    torch.testing.assert_close(found, sam.image_encoder(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prompts_with_an_image_each_are_decoded_as_by_sam_itself(vit_sam: Any) -> None:
    sparse, dense = vit_sam.prompt_encoder(None, torch.tensor([[4.0, 8.0, 40.0, 50.0], [1.0, 2.0, 30.0, 20.0]]), None)
    embeddings, positions = vit_sam.image_encoder(draw()), vit_sam.prompt_encoder.get_dense_pe()
    found = decode(vit_sam.mask_decoder, embeddings, positions, sparse, dense)
    for index in range(2):
        own = slice(index, index + 1)
        expected = vit_sam.mask_decoder.predict_masks(embeddings[own], positions, sparse[own], dense[own])
        for output, other in zip(found, expected, strict=True):
            torch.testing.assert_close(output[own], other)


@torch.no_grad()
def test_calibration_asks_each_image_within_its_padding_and_the_same_each_time(vit_sam: nn.Module) -> None:
    asked: list[dict[str, Any]] = []
    vit_sam.get_submodule("prompt_encoder").register_forward_pre_hook(
        lambda _, arguments, keywords: asked.append(keywords), with_kwargs=True
    )
    images = draw(8, filled=32)
    segment_densely(vit_sam, torch.cat([images, images]))
    boxes = torch.stack([keywords["boxes"] for keywords in asked if keywords["boxes"] is not None])
    points = torch.stack([keywords["points"][0] for keywords in asked if keywords["points"] is not None])
    assert torch.equal(boxes[:8], boxes[8:])
    assert torch.equal(points[:8], points[8:])
    assert len(boxes[:8].flatten(1).unique(dim=0)) == 8
    assert boxes.min() >= 0
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    assert boxes[..., [1, 3]].max() <= 32 < boxes[..., [0, 2]].max() <= SIZE
    assert points[..., 1].max() <= 32 < points[..., 0].max() <= SIZE


def sites(model: nn.Module) -> dict[str, str]:
    return {name: layer.role for name, layer in model.named_modules() if isinstance(layer, QuantWeightLayer)}


def test_the_sites_of_a_sam(vit_sam: nn.Module) -> None:
    network = adapt(vit_sam)
    roles = sites(vit_sam)
    layer = "mask_decoder.transformer.layers.1"
    expected = {
        "image_encoder.patch_embed.proj": "patch_embed",
        "image_encoder.blocks.0.attn.qkv": "qkv",
        "image_encoder.blocks.1.attn.proj": "proj",
        "image_encoder.blocks.0.mlp.lin1": "fc1",
        "image_encoder.blocks.0.mlp.lin2": "fc2",
        "image_encoder.neck.2": "neck",
        f"{layer}.self_attn.v_proj": "in_proj",
        f"{layer}.cross_attn_image_to_token.out_proj": "proj",
        f"{layer}.mlp.lin1": "fc1",
        f"{layer}.mlp.lin2": "relu",
        "mask_decoder.output_hypernetworks_mlps.3.layers.2": "head",
        "mask_decoder.iou_prediction_head.layers.0": "head",
    }
    assert {name: roles[name] for name in expected} == expected
    assert not any(name.startswith("prompt_encoder") for name in roles)
    assert network.unsupported == ()
    assert len(list(network.matmuls())) == 2 * (2 + 7)
    blocks = [f"image_encoder.blocks.{index}" for index in (0, 1)]
    assert set(network.input_norms) == {f"{name}.{layer}" for name in blocks for layer in ("attn.qkv", "mlp.lin1")}
    assert set(network.input_paddings) == {f"{name}.attn.qkv" for name in blocks}


def test_the_sites_of_a_tiny_vit(randomize: Randomize) -> None:
    encoder = randomize(make_sam("tiny_vit")).get_submodule("image_encoder")
    network = adapt(encoder)
    roles = sites(encoder)
    expected = {
        "trunk.patch_embed.conv1.conv": "patch_embed",
        "trunk.patch_embed.conv2.conv": "fc2",
        "trunk.stages.0.blocks.0.conv1.conv": "conv",
        "trunk.stages.0.blocks.0.conv2.conv": "fc2",
        "trunk.stages.0.blocks.0.conv3.conv": "fc2",
        "trunk.stages.1.downsample.conv1.conv": "conv",
        "trunk.stages.1.downsample.conv3.conv": "fc2",
        "trunk.stages.1.blocks.0.local_conv.conv": "conv",
        "trunk.stages.1.blocks.0.attn.qkv": "qkv",
        "trunk.stages.3.blocks.0.mlp.fc2": "fc2",
    }
    assert {name: roles[name] for name in expected} == expected
    assert network.unsupported == ()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    assert len(network.input_norms) == 2 * 3


@pytest.mark.parametrize("part", ["", "image_encoder"])
def test_modules_come_in_the_order_of_the_forward_pass(sam: nn.Module, part: str) -> None:
    network = adapt(sam.get_submodule(part))
    called: list[str] = []
    for name in network.units:
        network.model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        network.run(draw())
    assert tuple(called) == network.units


@torch.no_grad()
def test_reparameterized_norms_and_padding_compute_the_same(sam: Any) -> None:
    images, encoder = draw(), sam.image_encoder
    network = adapt(copy.deepcopy(encoder))
    create_method("repq_vit").apply(network, Run(CalibrationImages([images])), Bits(8, 8))
    with network.full_precision():
        torch.testing.assert_close(network.run(images)[0], encoder(images), rtol=1e-3, atol=1e-3)
    windowed = [m for m in network.model.modules() if isinstance(m, QuantEncoderAttention) and m.window_size]
    for attention in windowed:  # what the test above is able to see
        assert attention.padding.abs().max() > 0.01
        attention.padding.zero_()
        with network.full_precision():
            assert not torch.allclose(network.run(images)[0], encoder(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [name for name in methods() if name != adfq.methods()[0]])
def test_every_method_quantizes_every_sam(sam: nn.Module, method: str, quick: Mapping[str, Any]) -> None:
    quantized = adfq.quantize(sam, method, 8, 8, draw(), **quick[method])
    with torch.no_grad():
        for expected, found in zip(segment_densely(sam, draw()), segment_densely(quantized, draw()), strict=True):
            assert (found - expected).norm() < 0.35 * expected.norm()
    left = [
        name
        for name, layer in quantized.named_modules()
        if isinstance(layer, QuantWeightLayer)
        and nn.Identity in (type(layer.input_quantizer), type(layer.weight_quantizer))
    ]
    assert len(left) == (
        method in ("adalog", "aphq_vit", "erq", "fima_q", "iasvit", "ptq4vit")
    )  # which leave the input image alone
    matmuls = [module for module in quantized.modules() if isinstance(module, QuantMatMul)]
    assert all(matmul.left_quantizer.is_calibrated and matmul.right_quantizer.is_calibrated for matmul in matmuls)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in methods()[1:]],
)
def test_an_encoder_alone(sam: Any, method: str, quick: Mapping[str, Any]) -> None:
    encoder = adfq.quantize(sam.image_encoder, method, 8, 8, draw(), **quick[method])
    with torch.no_grad():
        expected = sam.image_encoder(draw())
        assert (encoder(draw()) - expected).norm() < 0.35 * expected.norm()


def test_patches_have_positions_within_a_window_only(vit_sam: nn.Module) -> None:
    quantized = adfq.quantize(vit_sam, "adfq_vit", 4, 4, draw(), iterations=0)
    kinds = {
        name: type(layer.input_quantizer)
        for name, layer in quantized.named_modules()
        if isinstance(layer, QuantWeightLayer) and layer.role in ("qkv", "fc1")
    }
    fixed = {name for name, kind in kinds.items() if kind is PerPatchOutlierQuantizer}
    assert fixed == {"image_encoder.blocks.0.attn.qkv"}
    assert all(kind is RunTimePatchOutlierQuantizer for name, kind in kinds.items() if name not in fixed)


def test_optimization_of_image_encoder_and_mask_decoder(sam: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"iterations": 20, "optimize_batch_size": 2, "rounding_learning_rate": 4e-2}
    quantized = adfq.quantize(sam, "adfq_vit", 3, 3, draw(4), resume=tmp_path, **options)
    results = quantized.quantization.report["modules"]
    assert list(results) == list(adapt(copy.deepcopy(sam)).units)
    assert sum(result["after"] < result["before"] for result in results.values()) > len(results) / 2
    again = adfq.quantize(sam, "adfq_vit", 3, 3, draw(4), resume=tmp_path, **options)
    with torch.no_grad():
        for one, other in zip(segment_densely(quantized, draw()), segment_densely(again, draw()), strict=True):
            assert torch.equal(one, other)


def test_a_sam_with_another_encoder(vit_sam: Any) -> None:
    vit_sam.image_encoder = nn.Conv2d(3, WIDTH, 8, 8)
    with pytest.raises(AdfqError, match="cannot quantize a Sam whose image encoder is a Conv2d"):
        adapt(vit_sam)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("vit", method) for method in methods()[1:]),
        *(("tiny_vit", method) for method in FAST),
        *(pytest.param("tiny_vit", method, marks=pytest.mark.slow) for method in methods()[1:] if method not in FAST),
    ],
)
def test_every_method_is_saved_and_loaded(
    kind: str,
    method: str,
    quick: Mapping[str, Any],
    randomize: Randomize,
    comes_back: Callable[..., Any],
    tmp_path: Path,
) -> None:
    quantized = adfq.quantize(randomize(make_sam(kind)), method, 4, 6, draw(), **quick[method])
    comes_back(quantized, tmp_path / "sam", segment_densely, draw())


def test_an_encoder_alone_is_saved_and_loaded(sam: Any, comes_back: Callable[..., Any], tmp_path: Path) -> None:
    quantized = adfq.quantize(sam.image_encoder, "base_ptq", 4, 6, draw())
    comes_back(quantized, tmp_path / "encoder", lambda encoder, images: [encoder(images)], draw())


def test_other_parts_are_not_rebuilt(vit_sam: Any, tmp_path: Path) -> None:
    vit_sam.mask_decoder.output_upscaling[4] = nn.ReLU()
    quantized = adfq.quantize(vit_sam, "base_ptq", 8, 8, draw())
    with pytest.raises(AdfqError, match=r"cannot be rebuilt .*output_upscaling\.4 becomes GELU"):
        adfq.save(quantized, tmp_path / "sam")
    vit_sam.prompt_encoder.mask_downscaling = nn.Identity()
    quantized = adfq.quantize(vit_sam, "base_ptq", 8, 8, draw())
    with pytest.raises(AdfqError, match="of parts of another make cannot be built"):
        adfq.save(quantized, tmp_path / "sam")
    assert not list(tmp_path.iterdir())


def test_mutated_files_are_refused(
    vit_sam: nn.Module, refuses_mutations: Callable[[Path], None], tmp_path: Path
) -> None:
    file = tmp_path / "sam"
    adfq.save(adfq.quantize(vit_sam, "base_ptq", 4, 4, draw()), file)
    refuses_mutations(file)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("image_encoder", "class"), "os.system", "no way to build an image encoder 'os.system'"),
        (("image_encoder", "depth"), "deep", "cannot build"),
        (("image_encoder", "norm_layer"), "os.system", "cannot build"),
        (("prompt_encoder",), 3, "cannot build"),
        (("pixel_mean",), None, "cannot build"),
        (("image_encoder",), {}, "cannot build"),
    ],
)
def test_forged_descriptions_are_refused(
    vit_sam: nn.Module,
    path: tuple[str, ...],
    value: Any,
    message: str,
    refuses_forgery: Callable[..., None],
) -> None:
    refuses_forgery(vit_sam, path, value, message)


# --- MobileSAM's own layout ------------------------------------------------------------------------------------------


def official_state(sam: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under MobileSAM's names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in sam.state_dict().items():
        name = name.replace("image_encoder.trunk.", "image_encoder.")
        name = name.replace("patch_embed.conv1.", "patch_embed.seq.0.").replace(
            "patch_embed.conv2.", "patch_embed.seq.2."
        )
        for stage in (1, 2, 3):
            name = name.replace(f"stages.{stage}.downsample.", f"layers.{stage - 1}.downsample.")
        name = name.replace("stages.", "layers.")
        if name.startswith("image_encoder.") and "neck" not in name:
            name = name.replace(".conv.weight", ".c.weight")
        if not tensor.is_floating_point():
            state[name] = tensor
        elif name.endswith("running_var"):
            state[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
            state[name] = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
    return state


def official_tiny_vit(state: Mapping[str, Tensor], images: Tensor, heads: tuple[int, ...], windows: int) -> Tensor:
    """MobileSAM's encoder as its authors define it, in functions of its state; blocks: one a stage."""

    def norm_conv(x: Tensor, name: str, **options: Any) -> Tensor:
        x = F.conv2d(x, state[f"{name}.c.weight"], **options)
        norm = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm)

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def attend(x: Tensor, name: str, count: int) -> Tensor:
        x = layer_norm(x, f"{name}.norm")
        query, key, value = linear(x, f"{name}.qkv").unflatten(-1, (count, 3, -1)).permute(3, 0, 2, 1, 4)
        offsets: dict[tuple[int, int], int] = {}
        points = [(row, column) for row in range(windows) for column in range(windows)]
        for one in points:
            for other in points:
                offsets.setdefault((abs(one[0] - other[0]), abs(one[1] - other[1])), len(offsets))
        index = [[offsets[abs(a - c), abs(b - d)] for c, d in points] for a, b in points]
        bias = state[f"{name}.attention_biases"][:, torch.tensor(index)]
        probabilities = (query @ key.mT * query.shape[-1] ** -0.5 + bias).softmax(-1)
        return linear((probabilities @ value).transpose(1, 2).flatten(2), f"{name}.proj")

    x = norm_conv(images, "patch_embed.seq.0", stride=2, padding=1)
    x = norm_conv(F.gelu(x), "patch_embed.seq.2", stride=2, padding=1)
    for stage in range(4):
        name = f"layers.{stage}.blocks.0"
        if stage == 0:
            inner = F.gelu(norm_conv(x, f"{name}.conv1"))
            inner = F.gelu(norm_conv(inner, f"{name}.conv2", padding=1, groups=inner.shape[1]))
            x = F.gelu(x + norm_conv(inner, f"{name}.conv3"))
        else:
            batch, width, height, _ = *x.shape[:2], *x.shape[2:]
            tokens = F.pad(x.movedim(1, -1), (0, 0, 0, -height % windows, 0, -height % windows))
            side = tokens.shape[1] // windows
            parts = tokens.reshape(batch, side, windows, side, windows, width).transpose(2, 3)
            parts = attend(parts.reshape(-1, windows**2, width), f"{name}.attn", heads[stage])
            parts = parts.reshape(batch, side, side, windows, windows, width).transpose(2, 3)
            x = x + parts.reshape(batch, side * windows, side * windows, width)[:, :height, :height].movedim(-1, 1)
            x = norm_conv(x, f"{name}.local_conv", padding=1, groups=width)
            tokens = x.movedim(1, -1)
            hidden = F.gelu(linear(layer_norm(tokens, f"{name}.mlp.norm"), f"{name}.mlp.fc1"))
            x = (tokens + linear(hidden, f"{name}.mlp.fc2")).movedim(-1, 1)
        if stage < 3:
            name = f"layers.{stage}.downsample"
            x = F.gelu(norm_conv(x, f"{name}.conv1"))
            # Of MobileSAM's two last stages both work at a sixteenth of the image's size.
            x = F.gelu(norm_conv(x, f"{name}.conv2", stride=2 if stage < 2 else 1, padding=1, groups=x.shape[1]))
            x = norm_conv(x, f"{name}.conv3")
    return x


@torch.no_grad()
def test_tiny_vit_in_the_official_layout(tmp_path: Path) -> None:
    from benchmarks.tasks.checkpoints import load_weights
    from benchmarks.tasks.segmentation.models import convert_layout

    sam = make_sam("tiny_vit").eval()
    state = official_state(sam)
    extra = {"image_encoder.norm_head.weight": torch.ones(24), "image_encoder.head.weight": torch.ones(10, 24)}
    torch.save({**state, **extra}, tmp_path / "mobile_sam.pt")
    load_weights(sam, str(tmp_path / "mobile_sam.pt"), "mobile_sam", convert_layout)
    prefix = "image_encoder."
    encoder = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    expected = official_tiny_vit(encoder, draw(), heads=(2, 2, 2, 3), windows=3)
    found = sam.get_submodule("image_encoder.trunk").forward_features(draw())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- calibration in batches -----------------------------------------------------------------------------------------


@pytest.fixture
def in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the prompt encoder take coordinates in double precision; it casts them to single."""
    encode = PositionEmbeddingRandom._pe_encoding
    monkeypatch.setattr(PositionEmbeddingRandom, "_pe_encoding", lambda self, coords: encode(self, coords.double()))


@pytest.mark.usefixtures("in_double_precision")
def test_batches_give_what_one_batch_gives(sam: nn.Module, same_in_batches: Callable[..., None]) -> None:
    same_in_batches(sam, draw(3), "base_ptq", [2, 1])


def test_nothing_runs_again_when_a_later_part_is_at_hand(sam: Any, walks: Callable[..., None]) -> None:
    walks(sam, draw(2))
    walks(sam.image_encoder, draw(2))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("part", ["", "image_encoder"])
@pytest.mark.usefixtures("in_double_precision")
@pytest.mark.filterwarnings("ignore:optimization made")
def test_batches_of_every_size(
    part: str, setting: str, size: int, sam: nn.Module, same_in_batches: Callable[..., None]
) -> None:
    same_in_batches(sam.get_submodule(part), draw(3), setting, size)
