"""Quantized models on disk: they come back bit for bit, and nothing but an intact file of our own is taken."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn

import adfq
from adfq.bits import Bits
from adfq.errors import AdfqError
from adfq.quantizers import Quantizer, UniformQuantizer

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]
METHODS = adfq.methods()[1:]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(images.to(next(model.parameters()).dtype))
    return output


def assert_same_model(loaded: nn.Module, model: nn.Module, images: Tensor) -> None:
    assert torch.equal(logits(loaded, images), logits(model, images))
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == trained
    assert not loaded.training


@pytest.fixture(scope="module")
def small(make_vit: MakeModel) -> nn.Module:
    """A small ViT of base_ptq at W4/A4."""
    return adfq.quantize(make_vit(), "base_ptq", calibration=torch.randn(4, 3, 32, 32))


@pytest.fixture
def quantized(small: nn.Module) -> nn.Module:
    """`small`, for a test to change."""
    return copy.deepcopy(small)


@pytest.fixture(scope="module")
def content(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Its file."""
    path = tmp_path_factory.mktemp("content") / "model"
    adfq.save(small, path)
    return path.read_bytes()


@pytest.fixture
def saved(content: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Changes header and tensors of a file and gives it the digest that belongs to them."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["adfq"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    header["sha256"] = "0" * 64
    content = to_bytes(tensors, {"adfq": json.dumps(header)})
    path.write_bytes(content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1))


def refused(path: Path) -> str:
    """The message of the one-line error that names the file."""
    with pytest.raises(AdfqError) as caught:
        adfq.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("family", "dtypes"), [("vit", DTYPES), ("swin", DTYPES[:1])])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_bit_for_bit(
    method: str,
    quick: Mapping[str, dict[str, Any]],
    family: str,
    dtypes: Sequence[torch.dtype],
    request: pytest.FixtureRequest,
    make_images: MakeImages,
    tmp_path: Path,
) -> None:
    model = request.getfixturevalue(f"make_{family}")()
    quantized = adfq.quantize(model, method, 4, 6, calibration=make_images(2), seed=3, **quick[method])
    for dtype in dtypes:
        cast = copy.deepcopy(quantized).to(dtype)
        adfq.save(cast, tmp_path / "model")
        loaded = adfq.load(tmp_path / "model")
        assert_same_model(loaded, cast, make_images(3, seed=2))
        # A file holds the model, and not what the method found out about it.
        assert loaded.quantization == dataclasses.replace(quantized.quantization, report={})
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("bits", "dtype"), [(2, torch.float32), (3, torch.float16), (8, torch.float16), (7, torch.bfloat16)], ids=str
)
def test_weights_are_packed_at_every_width(
    bits: int, dtype: torch.dtype, make_vit: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    quantized = adfq.quantize(make_vit().to(dtype), "adfq_vit", bits, bits, make_images(), iterations=0)
    adfq.save(quantized, tmp_path / "model")
    assert_same_model(adfq.load(tmp_path / "model"), quantized, make_images(3, seed=2))
    with safe_open(tmp_path / "model", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes["blocks.0.attn.qkv.codes"] == [48 * 144 * bits // 8]
    assert "blocks.0.attn.qkv.weight" not in shapes


def test_four_bits_take_four_bits(make_vit: MakeModel, make_images: MakeImages, tmp_path: Path) -> None:
    model = make_vit(embed_dim=192)
    adfq.save(adfq.quantize(model, "adfq_vit", calibration=make_images(), iterations=0), tmp_path / "model")
    floats = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "model").stat().st_size < 0.16 * floats


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": (32, 16), "in_chans": 1, "num_classes": 3},
        {"patch_size": (8, 4), "mlp_ratio": 2.36},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False, "reg_tokens": 3, "no_embed_class": True},
        {"qkv_bias": False, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
        {"proj_bias": False, "pre_norm": True, "init_values": 1e-5, "pos_embed": "none"},
        {"num_classes": 0},
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        {"cls": VisionTransformerDistilled},
    ],
    ids=str,
)
def test_the_architecture_is_told_from_a_vit(changes: dict[str, Any], make_vit: MakeModel, tmp_path: Path) -> None:
    model = make_vit(**changes)
    images = torch.randn(3, changes.get("in_chans", 3), *model.patch_embed.img_size)
    quantized = adfq.quantize(model, "repq_vit", calibration=images)  # changes norms, adds biases
    adfq.save(quantized, tmp_path / "model")
    loaded = adfq.load(tmp_path / "model")
    assert_same_model(loaded, quantized, images)
    assert type(loaded) is type(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": (32, 24), "in_chans": 1, "num_classes": 3},
        {"window_size": ((4, 2), (2, 4)), "global_pool": "max", "mlp_ratio": 2.5, "qkv_bias": False},
        {"window_size": 16},
        {"window_size": 5, "head_dim": 8, "always_partition": True},
        {"strict_img_size": False, "patch_size": 4},
    ],
    ids=str,
)
def test_the_architecture_is_told_from_a_swin(changes: dict[str, Any], make_swin: MakeModel, tmp_path: Path) -> None:
    model = make_swin(**changes)
    images = torch.randn(3, changes.get("in_chans", 3), *model.patch_embed.img_size)
    quantized = adfq.quantize(model, "repq_vit", calibration=images)  # changes norms, adds biases
    quantized.half()  # and masks with it, which are in no file
    adfq.save(quantized, tmp_path / "model")
    loaded = adfq.load(tmp_path / "model")
    assert_same_model(loaded, quantized, images)
    assert loaded.quantization == quantized.quantization


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch32_clip_quickgelu_224"]
)
def test_what_only_timms_name_tells_comes_back(name: str, make_images: MakeImages, tmp_path: Path) -> None:
    model = timm.create_model(
        name, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
    ).eval()
    quantized = adfq.quantize(model, "base_ptq", calibration=make_images())
    adfq.save(quantized, tmp_path / "model")
    loaded = adfq.load(tmp_path / "model")
    assert_same_model(loaded, quantized, make_images(3, seed=2))
    assert loaded.pretrained_cfg == model.pretrained_cfg


def test_the_header_says_how_it_was_made(make_vit: MakeModel, make_images: MakeImages, tmp_path: Path) -> None:
    quantized = adfq.quantize(make_vit(), "adfq_vit", 3, 5, make_images(), seed=7, iterations=0, qkv_threshold=4.0)
    adfq.save(quantized, tmp_path / "model", notes={"model": "mine"})
    with safe_open(tmp_path / "model", "pt") as file:
        header = json.loads(file.metadata()["adfq"])
    assert header["format"] == 1
    assert (header["method"], header["bits"], header["seed"], header["calibration_size"]) == ("adfq_vit", "W3/A5", 7, 4)
    assert header["options"]["qkv_threshold"] == 4.0
    assert header["options"]["fc1_threshold"] == 10.0  # a default
    assert set(header["versions"]) == {"adfq", "torch", "timm"}
    assert header["quantizers"]["blocks.1.attn.qkv.input_quantizer"] == {
        "class": "adfq.quantizers.per_patch.PerPatchOutlierQuantizer",
        "arguments": {"bits": 5, "threshold": 4.0},
    }
    loaded = adfq.load(tmp_path / "model")
    assert loaded.quantization.bits == Bits(3, 5)
    assert loaded.quantization.notes == {"model": "mine"}
    adfq.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_loaded_model_is_not_quantized_again(
    family: str, request: pytest.FixtureRequest, make_images: MakeImages, tmp_path: Path
) -> None:
    model = request.getfixturevalue(f"make_{family}")()
    adfq.save(adfq.quantize(model, "base_ptq", calibration=make_images()), tmp_path / "model")
    with pytest.raises(AdfqError, match="the model is quantized already"):
        adfq.quantize(adfq.load(tmp_path / "model"), "base_ptq", calibration=make_images())


def test_random_numbers_go_on_as_if_nothing_had_been_loaded(saved: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    adfq.load(saved)
    assert torch.equal(torch.rand(1), expected)


class Halver(Quantizer):
    """A third party's: no codes, an argument of its own."""

    def __init__(self, bits: int, factor: float = 0.5) -> None:
        super().__init__(bits)
        self.factor = factor

    def _find_range(self, x: Tensor) -> None:
        self.scale = x.abs().max()

    def _quantize(self, x: Tensor) -> Tensor:
        return x * self.factor


class Forgetful(UniformQuantizer):
    """Does not keep its argument."""

    def __init__(self, bits: int, secret: int = 1) -> None:
        super().__init__(bits)


def exchange_quantizer(model: nn.Module, quantizer: nn.Module) -> None:
    """Gives one layer another weight quantizer."""
    layer = model.get_submodule("blocks.0.mlp.fc1")
    layer.weight_quantizer = quantizer
    if isinstance(quantizer, Quantizer):
        layer.find_weight_range()
        layer.freeze()


def test_a_weight_without_codes_is_kept_in_floating_point(
    quantized: nn.Module, make_images: MakeImages, tmp_path: Path
) -> None:
    exchange_quantizer(quantized, Halver(4, 0.25))
    adfq.save(quantized, tmp_path / "model")
    loaded = adfq.load(tmp_path / "model")
    assert_same_model(loaded, quantized, make_images())
    assert loaded.get_submodule("blocks.0.mlp.fc1").weight_quantizer.factor == 0.25


def test_eight_bits_in_bfloat16_come_back_though_they_may_not_be_packed(
    make_vit: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    model = make_vit()
    for parameter in model.parameters():
        parameter.data.abs_()  # codes up to 255 steps from zero, which bfloat16 does not tell apart
    quantized = adfq.quantize(model, "base_ptq", 8, 8, calibration=make_images()).bfloat16()
    adfq.save(quantized, tmp_path / "model")
    assert_same_model(adfq.load(tmp_path / "model"), quantized, make_images())


def test_a_weight_off_its_grid_is_refused(quantized: nn.Module, tmp_path: Path) -> None:
    quantized.get_parameter("blocks.0.mlp.fc1.weight").mul_(1.01)
    with pytest.raises(AdfqError, match=r"blocks\.0\.mlp\.fc1\.weight was changed after quantization"):
        adfq.save(quantized, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Forgetful(4), "Forgetful does not keep its argument 'secret'"),
        (nn.ReLU, "a ReLU is not a Quantizer"),
    ],
)
def test_quantizers_that_cannot_be_described_are_refused(
    make: Callable[[], nn.Module], message: str, quantized: nn.Module, tmp_path: Path
) -> None:
    exchange_quantizer(quantized, make())
    with pytest.raises(AdfqError, match=message):
        adfq.save(quantized, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_only_quantized_models_are_saved(make_vit: MakeModel, tmp_path: Path) -> None:
    for model in (make_vit(), adfq.quantize(make_vit(), "full_precision"), nn.Linear(2, 2)):
        with pytest.raises(AdfqError, match=r"only a model that adfq\.quantize has quantized"):
            adfq.save(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_layer": nn.ReLU}, r"blocks\.0\.mlp\.act becomes GELU\(.*\) in place of ReLU\(\)"),
        ({"norm_layer": lambda width, **_: nn.LayerNorm(width, eps=0.1)}, r"norm1 becomes .*eps=1e-06.* of .*eps=0.1"),
        ({"block_fn": ParallelThingsBlock}, r"its model has no place .blocks\.0\.attns\.0\."),
    ],
)
def test_an_architecture_that_is_not_told_from_the_model_is_refused(
    changes: dict[str, Any], message: str, make_vit: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    (tmp_path / "model").write_bytes(b"what was there")
    quantized = adfq.quantize(make_vit(**changes), "base_ptq", calibration=make_images())
    with pytest.raises(AdfqError, match=f"cannot be rebuilt from its description: .*{message}"):
        adfq.save(quantized, tmp_path / "model")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what was there"]


@pytest.mark.parametrize("method", METHODS)
def test_another_gelu_is_refused_though_it_hardly_moves_the_logits(
    method: str, quick: Mapping[str, dict[str, Any]], make_vit: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    model = make_vit(act_layer=lambda: nn.GELU(approximate="tanh"))
    quantized = adfq.quantize(model, method, calibration=make_images(2), **quick[method])
    with pytest.raises(AdfqError, match=r"mlp\.act.* becomes GELU\(.*'none'\) in place of GELU\(.*'tanh'\)"):
        adfq.save(quantized, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_padding_to_whole_patches_is_kept(make_vit: MakeModel, make_images: MakeImages, tmp_path: Path) -> None:
    model = make_vit(dynamic_img_size=True, dynamic_img_pad=True)
    quantized = adfq.quantize(model, "base_ptq", calibration=make_images())
    adfq.save(quantized, tmp_path / "model")
    other = torch.randn(2, 3, 27, 35)
    assert torch.equal(logits(adfq.load(tmp_path / "model"), other), logits(quantized, other))


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": (0.1, 0.2, 0.3), "std": [0.5, 0.25, 0.125], "interpolation": "nearest", "input_size": (3, 48, 48)},
        {"crop_pct": 0.5, "crop_mode": "squash", "mean": tuple(np.float32([0.1, 0.2, 0.3])), "notes": object()},
        {"crop_pct": None, "interpolation": ""},
    ],
    ids=("values", "more values", "no values"),
)
@pytest.mark.parametrize("named", [True, False])
def test_preprocessing_is_kept(
    named: bool, changed: dict[str, Any], make_vit: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    model: Any = timm.create_model("vit_tiny_patch16_224", **arguments) if named else make_vit()
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), **changed}
    adfq.save(adfq.quantize(model, "base_ptq", calibration=make_images()), tmp_path / "model")
    assert resolve_model_data_config(adfq.load(tmp_path / "model")) == resolve_model_data_config(model)


def test_a_file_without_preprocessing_is_still_read(saved: Path) -> None:
    forge(saved, lambda header, _: header.pop("pretrained_cfg"))
    assert not hasattr(adfq.load(saved), "pretrained_cfg")


class Custom(VisionTransformer):
    """A class that only its author has."""


def test_a_class_of_ones_own_is_quantized_but_not_saved(
    make_vit: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    quantized = adfq.quantize(make_vit(Custom), "base_ptq", calibration=make_images())
    with pytest.raises(AdfqError, match=r"cannot be rebuilt .* no way to build a .*Custom"):
        adfq.save(quantized, tmp_path / "model")


def test_targets_that_cannot_be_written_are_one_line(quantized: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no" / "model", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(AdfqError, match=r"cannot write [^\n]*: [^\n]+\Z"):
            adfq.save(quantized, path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_options_that_json_does_not_have_are_refused(quantized: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(AdfqError, match="JSON's types"):
        adfq.save(quantized, tmp_path / "model", notes={"when": object()})


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.05, 0.5, 0.99])
def test_truncated_files_are_refused(share: float, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    assert "not a safetensors file, or a damaged one" in refused(saved)
    saved.write_bytes(content[:-1])
    assert "damaged" in refused(saved)


def test_one_flipped_byte_is_found_wherever_it_is(saved: Path) -> None:
    content = saved.read_bytes()
    header = int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    in_header = torch.randint(8, 8 + header, (40,), generator=generator).tolist()
    in_tensors = torch.randint(8 + header, len(content), (20,), generator=generator).tolist()
    for position in (*range(8), *in_header, *in_tensors, len(content) - 1):
        for change in (0x01, 0x2A, 0xFF):  # 0x2A makes a line feed of a space
            damaged = bytearray(content)
            damaged[position] ^= change
            saved.write_bytes(damaged)
            refused(saved)


def test_other_files_are_refused(saved: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    assert "not written by adfq.save" in refused(foreign)
    for header in ("", "{", "{}", "[]", "3", '"sha256"', "[" * 100_000):
        save_file({"weight": torch.zeros(3)}, foreign, {"adfq": header})
        assert "not written by adfq.save" in refused(foreign)
    for digest in (None, 3, "", "0" * 64):
        save_file({"weight": torch.zeros(3)}, foreign, {"adfq": json.dumps({"sha256": digest})})
        assert "does not have the digest" in refused(foreign)
    pickled = tmp_path / "model.pth"
    torch.save({"weight": torch.zeros(3)}, pickled)
    assert "not a safetensors file" in refused(pickled)
    pickled.write_bytes(b"")
    assert "not a safetensors file" in refused(pickled)
    assert "No such file" in refused(tmp_path / "missing")
    assert "directory" in refused(tmp_path).lower()


def set_field(name: str, value: object) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    *path, last = name.split("/")

    def change(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        for key in path:
            header = header[key]
        header[last] = value

    return change


def set_tensor(name: str, value: Tensor | None) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


SITE = "quantizers/blocks.0.mlp.fc1.input_quantizer"
CODES = "blocks.0.mlp.fc1.codes"
DEPTH = 3000 if sys.version_info >= (3, 12) else 700  # json has a limit of its own since Python 3.12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("format", 5), "written in format 5; this version of adfq reads formats 1, 2, 3, 4"),
        (set_field("maps", ["blocks.0.attn"]), "blocks.0.attn is no LayerNorm over channels"),
        (set_field("maps", [["norm"]]), "names no modules"),
        (set_field("relu", ["blocks.0.attn"]), "blocks.0.attn is no MLP with a GELU"),
        (set_field("relu", "blocks.0.mlp"), "no usable 'relu'"),
        (set_field("format", None), "written in format None"),
        (set_field("seed", "0"), "no usable 'seed'"),
        (set_field("method", 3), "no usable 'method'"),
        (set_field("notes", []), "no usable 'notes'"),
        (set_field("bits", "W9/A9"), "from 2 to 8"),
        (set_field("bits", "four"), "cannot read bits"),
        (set_field("dtype", "torch.int8"), "names the dtype 'torch.int8'"),
        (set_field("architecture", {}), "architecture has no usable 'family'"),
        (set_field("architecture/family", "os.system"), "there is no adapter for 'os.system'"),
        (set_field("architecture/cls", "os.system"), "no way to build a os.system"),
        (set_field("architecture/name", "hf-hub:some/model"), "has no model 'hf-hub:some/model'"),
        (set_field("architecture/name", "swin_tiny_patch4_window7_224"), "cannot build swin_tiny"),
        (set_field("architecture/input_size", [3, 32]), "no usable 'input_size'"),
        (set_field("architecture/arguments/pretrained", True), "no argument 'pretrained'"),
        (set_field("architecture/arguments/checkpoint_path", "x"), "no argument 'checkpoint_path'"),
        (set_field("architecture/arguments/depth", "deep"), "cannot build"),
        (set_field("architecture/arguments/depth", 1), "no place 'blocks.1.attn.qkv.input_quantizer'"),
        (set_field("architecture/arguments/embed_dim", 24), "has shape"),
        (set_field("pretrained_cfg", {"mean": json.loads("[" * DEPTH + "]" * DEPTH)}), "nested too deeply"),
        (set_field("quantizers/blocks.0.norm1", {}), "no place 'blocks.0.norm1'"),
        (set_field(SITE, None), "not described"),
        (set_field(f"{SITE}/class", "os.system"), "unknown quantizer 'os.system'"),
        (set_field(f"{SITE}/class", "adfq.quantizers.base.Quantizer"), "unknown quantizer"),
        (set_field(f"{SITE}/arguments", []), "no usable 'arguments'"),
        (set_field(f"{SITE}/arguments/bits", 99), "from 2 to 8"),
        (set_field(f"{SITE}/arguments/wings", 2), "cannot make its quantizer"),
        (set_tensor("norm.weight", None), "lacks norm.weight"),
        (set_tensor("wings", torch.zeros(2)), "unexpected tensor wings"),
        (set_tensor("norm.weight", torch.zeros(2)), r"norm.weight has shape (2,), the model (48,)"),
        (set_tensor("norm.weight", torch.zeros(48, dtype=torch.int32)), "has dtype torch.int32"),
        (set_tensor("blocks.0.mlp.fc1.input_quantizer.scale", torch.zeros(0)), "scale is empty"),
        (set_tensor("blocks.0.mlp.fc1.input_quantizer.scale", torch.zeros(1).half()), "has dtype torch.float16"),
        (set_tensor(CODES, None), "lacks blocks.0.mlp.fc1.weight"),
        (set_tensor(CODES, torch.zeros(5, dtype=torch.uint8)), "does not fit a weight of shape (192, 48) at 4 bits"),
        (set_tensor(CODES, torch.zeros(4608)), "does not fit"),
        (set_tensor("blocks.0.mlp.fc1.weight_quantizer.scale", torch.ones(7, 1)), "cannot be decoded"),
        (set_tensor("norm.codes", torch.zeros(5, dtype=torch.uint8)), "unexpected tensor norm.codes"),
    ],
)
def test_forged_files_are_refused(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None], message: str, saved: Path
) -> None:
    forge(saved, change)
    assert message in refused(saved)


def test_codes_need_a_quantizer(saved: Path) -> None:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del header["quantizers"]["head.weight_quantizer"]
        for name in ("scale", "zero_point"):
            del tensors[f"head.weight_quantizer.{name}"]

    forge(saved, change)
    assert "codes for head, which has no weight quantizer" in refused(saved)


def test_forging_nothing_changes_nothing(saved: Path) -> None:
    content = saved.read_bytes()
    forge(saved, lambda *_: None)
    assert saved.read_bytes() == content
