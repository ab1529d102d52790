"""Exported models compute what the simulation does, on integers; what cannot be exported says so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError, export_onnx, quantize
from adfq.export import Exported, file_size
from adfq.export.forms import Logarithmic, convert_quantizer
from adfq.export.graphs import image_graph
from adfq.export.products import convert
from adfq.export.storage import writing
from adfq.export.trace import trace
from adfq.layers import QuantConv2d
from adfq.quantizers import (
    AdaLogQuantizer,
    AffineUniformQuantizer,
    LogQuantizer,
    NumeratorQuantizer,
    PerPatchOutlierQuantizer,
    Quantizer,
    RunTimePatchOutlierQuantizer,
    ShiftLogQuantizer,
    ShiftUniformLogQuantizer,
    TwinGeluQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)
from adfq.quantizers.twin import GELU_DEPTH
from adfq.sites import Network
from benchmarks.cell import Cell
from benchmarks.studies import deployment
from benchmarks.tasks import load_subject

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


@torch.no_grad()
def difference(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    """‖difference‖ / ‖logits‖."""
    expected = reference(images)
    return float((model(images) - expected).norm() / expected.norm())


def uniform(model: nn.Module, site: str) -> UniformQuantizer:
    quantizer = model.get_submodule(site)
    assert isinstance(quantizer, UniformQuantizer)
    return quantizer


@pytest.fixture(scope="module")
def models(make_vit: MakeModel) -> dict[str, nn.Module]:
    """A ViT of one block by method, at W8/A8."""
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {method: quantize(make_vit(depth=1), method, 8, 8, images) for method in ("base_ptq", "repq_vit")}


@pytest.fixture(scope="module")
def files(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Exported]]:
    """Their files, and what became of their products."""
    folder = tmp_path_factory.mktemp("onnx")
    return {method: (folder / method, export_onnx(model, folder / method)) for method, model in models.items()}


def test_base_ptq_runs_on_integers_alone(files: dict[str, tuple[Path, Exported]], models: dict[str, nn.Module]) -> None:
    file, exported = files["base_ptq"]
    assert deployment.count_integer_products(file) == len(exported.integer) == 8  # embedding, 4 + 2, head
    assert exported.integer[0] == "patch_embed.proj"
    assert exported.floating == {}
    runtime = deployment.OnnxModel(file)
    for count in (1, 3):
        images = torch.randn(count, 3, 32, 32)
        assert runtime(images).shape == (count, 10)
        # Rounding in another order moves a value to the next code now and then, and that is felt to the end.
        assert difference(runtime, models["base_ptq"], images) < 0.02


@pytest.mark.parametrize(("make", "shape"), [("make_vit", {}), ("make_swin", {"depths": (1, 2)})])
def test_scales_of_rows_and_columns_leave_the_integer_products(
    make: str, shape: dict[str, Any], make_images: MakeImages, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = quantize(request.getfixturevalue(make)(**shape), "row_ridge", 8, 8, make_images(8))
    assert any(quantizer.scale.numel() > 1 for quantizer in Network(model).activation_quantizers().values())
    exported = export_onnx(model, tmp_path / "model.onnx")
    assert exported.floating == {}
    assert deployment.count_integer_products(tmp_path / "model.onnx") == len(exported.integer)
    images = make_images(4, seed=2)
    assert difference(deployment.OnnxModel(tmp_path / "model.onnx"), model, images) < 0.02
    quantizers = Network(model).activation_quantizers().values()
    points = [quantizer.zero_point for quantizer in quantizers if isinstance(quantizer, AffineUniformQuantizer)]
    assert any((found.frac() != 0).any() for found in points)


def test_repq_vits_probabilities_stay_in_float(
    files: dict[str, tuple[Path, Exported]], models: dict[str, nn.Module]
) -> None:
    file, exported = files["repq_vit"]
    assert deployment.count_integer_products(file) == len(exported.integer) == 7
    assert list(exported.floating) == ["blocks.0.attn.context"]
    assert all("logarithmic levels" in reason for reason in exported.floating.values())
    runtime, images = deployment.OnnxModel(file), torch.randn(4, 3, 32, 32)
    zero_point = uniform(models["repq_vit"], "blocks.0.attn.qkv.input_quantizer").zero_point
    assert zero_point.frac() != 0  # so that the ends of its range are not quite the same
    assert difference(runtime, models["repq_vit"], images) < 0.05


def test_files_are_small_and_the_same_each_time(
    files: dict[str, tuple[Path, Exported]], models: dict[str, nn.Module], tmp_path: Path
) -> None:
    file, _ = files["base_ptq"]
    again = tmp_path / "again"
    again.write_bytes(b"what was here before")
    export_onnx(models["base_ptq"], again)
    assert again.read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    weights = sum(parameter.numel() for parameter in models["base_ptq"].parameters())
    assert file.stat().st_size < weights + 100_000  # a byte each, and the graph
    assert str(Path(adfq.__file__).parent).encode() not in file.read_bytes()


@pytest.mark.parametrize(("method", "bits"), [("base_ptq", 3), ("base_ptq", 4), ("ptq4vit", 4), ("row_ridge", 3)])
def test_weights_of_four_bits_take_half_a_byte(
    method: str,
    bits: int,
    make_vit: MakeModel,
    make_images: MakeImages,
    quick: Mapping[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    import onnx

    # fc2 has 72 inputs, which is no multiple of a block.
    model = quantize(make_vit(depth=1, mlp_ratio=1.5), method, bits, 8, make_images(8), **quick[method])
    file = tmp_path / "model"
    exported = export_onnx(model, file)
    stored = onnx.load(file).graph.initializer
    narrow = [tensor.name for tensor in stored if tensor.data_type == onnx.TensorProto.INT4]
    layers = dict(Network(model).weight_layers())
    assert {name.removesuffix(".codes.int4") for name in narrow} == set(exported.integer) & layers.keys()
    assert deployment.count_integer_products(file) == len(exported.integer)
    assert deployment.count_integer_products(file, deployment.NARROW_OPERATORS) == (
        "blocks.0.mlp.fc2" in exported.floating
    )
    assert ("blocks.0.mlp.fc2" in exported.floating) == (method == "ptq4vit")
    images = make_images(4, seed=2)
    assert difference(deployment.OnnxModel(file), model, images) < 0.02


@pytest.mark.parametrize(
    "shape", [{"padding": 1}, {"stride": 2, "groups": 6}, {"padding": "same", "dilation": 2, "groups": 2}]
)
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_convolutions_that_overlap_are_float_ones_of_quantized_operands(
    shape: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    images = torch.randn(2, 6, 9, 9) + 0.5
    layer = QuantConv2d(nn.Conv2d(6, 12, 3, **shape), "patch_embed")
    layer.input_quantizer = UniformQuantizer(8).calibrate(images)
    layer.weight_quantizer = UniformQuantizer(bits, "row").calibrate(layer.weight)
    layer.freeze()
    expected = layer(images)
    model = nn.Sequential(layer).eval()
    exported = convert(model)
    assert list(exported.floating) == ["0"]
    assert "windows of the convolution overlap" in exported.floating["0"]
    with writing(trace(image_graph("classifier", model, (6, 9, 9), "logits")), tmp_path / "model"):
        pass
    torch.testing.assert_close(deployment.OnnxModel(tmp_path / "model")(images), expected, rtol=1e-4, atol=1e-5)


def test_large_models_have_their_weights_in_a_second_file(
    models: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = models["base_ptq"], torch.randn(4, 3, 32, 32)
    monkeypatch.setattr("adfq.export.storage._LARGEST", 1000)
    (tmp_path / "model.data").mkdir()
    with pytest.raises(AdfqError, match=r"cannot write .*model\.data: it is a directory"):
        export_onnx(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.data"]
    (tmp_path / "model.data").rmdir()
    export_onnx(model, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.data"}
    assert (tmp_path / "model").stat().st_size < 50_000
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights < (tmp_path / "model.data").stat().st_size < 1.5 * weights
    assert difference(deployment.OnnxModel(tmp_path / "model"), model, images) < 0.02
    assert file_size(tmp_path / "model") == sum(file.stat().st_size for file in tmp_path.iterdir())
    monkeypatch.undo()
    export_onnx(model, tmp_path / "model")  # a smaller one takes its place
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    (tmp_path / "model.data").write_text("somebody's own")
    export_onnx(model, tmp_path / "model")
    assert (tmp_path / "model.data").read_text() == "somebody's own"
    assert file_size(tmp_path / "model") == (tmp_path / "model").stat().st_size


def test_the_given_model_stays_as_it_is(models: dict[str, nn.Module], files: dict[str, tuple[Path, Exported]]) -> None:
    assert files
    for model in models.values():
        assert len(list(Network(model).matmuls())) == 2
        assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_kernels_that_saturate_are_not_used(
    files: dict[str, tuple[Path, Exported]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = files["base_ptq"]
    images = torch.randn(4, 3, 32, 32)
    expected = deployment.OnnxModel(file)(images)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    torch.testing.assert_close(deployment.OnnxModel(file)(images), expected, rtol=0.02, atol=0.02)


def test_ranges_without_zero_and_operands_in_full_precision(make_vit: MakeModel, tmp_path: Path) -> None:
    """Cases that models as they are quantized do not have."""
    images = torch.randn(8, 3, 32, 32)
    model = make_vit(depth=1)
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc2.weight")[:5].abs_().add_(0.5)
        model.get_parameter("blocks.0.mlp.fc1.weight")[:5].abs_().neg_().sub_(0.5)
    model = quantize(model, "base_ptq", 4, 8, images)
    for layer, outside in (("fc1", lambda code: code > 15), ("fc2", lambda code: code < 0)):
        assert outside(uniform(model, f"blocks.0.mlp.{layer}.weight_quantizer").zero_point).sum() >= 5
    offsets = {
        "patch_embed.proj.input_quantizer": -20.0,
        "blocks.0.attn.scores.left_quantizer": 290.0,
        "blocks.0.attn.scores.right_quantizer": -30.0,
        "blocks.0.attn.context.left_quantizer": -3.0,
        "blocks.0.mlp.fc1.input_quantizer": 300.0,
    }
    for site, zero_point in offsets.items():
        uniform(model, site).zero_point.fill_(zero_point)
    for layer, attribute in (("blocks.0.attn.proj", "input_quantizer"), ("head", "weight_quantizer")):
        setattr(model.get_submodule(layer), attribute, nn.Identity())
    file = tmp_path / "model"
    exported = export_onnx(model, file)
    assert exported.floating == dict.fromkeys(["blocks.0.attn.proj", "head"], "an operand is not quantized")
    assert deployment.count_integer_products(file) == len(exported.integer) == 6
    assert difference(deployment.OnnxModel(file), model, images) < 0.02


def test_logarithmic_levels_are_those_of_the_quantizer() -> None:
    values = torch.cat((torch.zeros(1), torch.logspace(-45, 0.5, 10_000)))
    for bits in (2, 4, 8):
        quantizer = LogQuantizer(bits).calibrate(torch.rand(1000))
        with torch.no_grad():
            torch.testing.assert_close(Logarithmic(quantizer)(values), quantizer(values), rtol=1e-4, atol=1e-30)


GELU = torch.nn.functional.gelu(torch.linspace(-8, 8, 4001)).reshape(1, -1, 1)
PROBABILITIES = torch.cat((torch.zeros(1), torch.logspace(-12, 0, 4000))).reshape(1, -1, 1)
TOKENS = torch.linspace(-6, 6, 4000).reshape(1, 4, 1000) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None] + 1


@pytest.mark.parametrize(
    ("quantizer", "values"),
    [
        (AdaLogQuantizer(8), PROBABILITIES),
        (AdaLogQuantizer(4, shift=GELU_DEPTH), GELU),
        (AdaLogQuantizer(8, shift=GELU_DEPTH, folded=True), GELU),
        (TwinSoftmaxQuantizer(8), PROBABILITIES),
        (TwinSoftmaxQuantizer(4, released=True), PROBABILITIES),
        (TwinGeluQuantizer(8), GELU),
        (ShiftUniformLogQuantizer(8), PROBABILITIES),
        (ShiftUniformLogQuantizer(4, released=True), PROBABILITIES),
        (ShiftLogQuantizer(8, shift="static"), GELU),
        (PerPatchOutlierQuantizer(8, 5.0), TOKENS),
        (UniformQuantizer(8, "patch"), TOKENS),
        (AffineUniformQuantizer(8, "patch"), TOKENS),
        (NumeratorQuantizer(8), PROBABILITIES),
    ],
    ids=lambda value: value.describe() if isinstance(value, Quantizer) else "",
)
@torch.no_grad()
def test_forms_are_the_quantizers_in_onnxruntime(quantizer: Quantizer, values: Tensor, tmp_path: Path) -> None:
    quantizer.calibrate(values)
    beyond = torch.cat((values, 1.2 * values), -1)
    file, form = tmp_path / "form", convert_quantizer(quantizer).eval()
    with writing(trace(image_graph("classifier", form, tuple(beyond.shape), "logits")), file):
        pass
    images = beyond[None].expand(2, -1, -1, -1)
    found, expected = deployment.OnnxModel(file)(images)[0], quantizer(beyond)
    same = torch.isclose(found, expected, rtol=1e-5, atol=1e-7)
    assert same.double().mean() > 0.998  # the others are ties, which a logarithm of another kernel breaks otherwise
    assert found[~same].sub(expected[~same]).abs().le(0.2 * expected.abs().max()).all()


def test_a_product_of_several_grids_is_one_in_float(
    make_vit: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    model = quantize(make_vit(depth=1), "base_ptq", 8, 8, make_images())
    quantizer = uniform(model, "blocks.0.attn.qkv.input_quantizer")
    quantizer.scale = quantizer.scale * torch.linspace(1, 2, 48)
    heads = uniform(model, "blocks.0.attn.scores.left_quantizer")
    heads.scale = heads.scale * torch.tensor([1.0, 1.1, 1.2]).view(1, 3, 1, 1)
    heads.zero_point = heads.zero_point + torch.tensor([0.0, 3.0, 6.0]).view(1, 3, 1, 1)
    exported = export_onnx(model, tmp_path / "model")
    assert list(exported.floating) == ["blocks.0.attn.qkv", "blocks.0.attn.scores"]
    assert all("all in a sum have one grid" in reason for reason in exported.floating.values())
    images = make_images(3, seed=2)
    assert difference(deployment.OnnxModel(tmp_path / "model"), model, images) < 0.02


# Tests above export the others. In those that are slow, all quantizers are uniform as in base_ptq.
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("glf_q", "gptq", "qdrop") else [])
        for name in sorted(set(adfq.methods()) - {"full_precision", "base_ptq", "repq_vit", "row_ridge", "ptq4vit"})
    ],
)
def test_every_method_is_exported_or_refused(
    method: str, make_vit: MakeModel, make_images: MakeImages, quick: Mapping[str, dict[str, Any]], tmp_path: Path
) -> None:
    model = quantize(make_vit(depth=1), method, 8, 8, make_images(8), **quick[method])
    file = tmp_path / "model"
    if method == "adfq_vit":
        with pytest.raises(AdfqError, match="shifted by the minimum"):
            export_onnx(model, file)
        return
    # Ends of ranges move where zero points become whole; I&S-ViT's powers of 2 make much of the least difference.
    for quantizer in Network(model).activation_quantizers().values():
        if isinstance(quantizer, UniformQuantizer) and not isinstance(quantizer, AffineUniformQuantizer):
            quantizer.zero_point.round_()
    exported = export_onnx(model, file)
    assert deployment.count_integer_products(file) == len(exported.integer)
    images = make_images(4, seed=2)
    assert difference(deployment.OnnxModel(file), model, images) < 0.05


class Halves(Quantizer):
    """A quantizer that nobody knows."""

    def _find_range(self, x: Tensor) -> None:
        self.scale = torch.tensor(0.5)

    def _quantize(self, x: Tensor) -> Tensor:
        return x


def run_time(model: nn.Module) -> None:
    quantizer = RunTimePatchOutlierQuantizer(8, 3.0).calibrate(torch.ones(1))
    model.blocks[0].attn.qkv.input_quantizer = quantizer  # type: ignore[union-attr, index]


def unknown(model: nn.Module) -> None:
    model.blocks[0].attn.qkv.input_quantizer = Halves(8)  # type: ignore[union-attr, index]


def logarithmic_weight(model: nn.Module) -> None:
    model.blocks[1].mlp.fc2.weight_quantizer = LogQuantizer(8)  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("method", "options", "bits", "change", "message"),
    [
        ("adfq_vit", {}, 8, None, r"blocks\.0\.mlp\.fc2\.input_quantizer .* shifted by the minimum"),
        ("base_ptq", {}, 8, run_time, r"blocks\.0\.attn\.qkv\.input_quantizer .* found at run time, patch by patch"),
        ("base_ptq", {}, 6, None, r"blocks\.0\.attn\.qkv\.input_quantizer .* 8 bits, .* quantize activations to 8"),
        ("base_ptq", {}, 8, unknown, r"blocks\.0\.attn\.qkv\.input_quantizer .*Halves.* ONNX has no operator for it"),
        ("base_ptq", {}, 8, logarithmic_weight, r"blocks\.1\.mlp\.fc2\.weight_quantizer .* only uniform ones can"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    method: str,
    options: dict[str, Any],
    bits: int,
    change: Callable[[nn.Module], None] | None,
    message: str,
    make_vit: MakeModel,
    make_images: MakeImages,
    quick: Mapping[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    model = quantize(make_vit(), method, 8, bits, make_images(), **quick[method], **options)
    if change is not None:
        change(model)
    with pytest.raises(AdfqError, match=message) as error:
        export_onnx(model, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_only_quantized_models_are_exported(make_vit: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(AdfqError, match=r"only a model that adfq\.quantize has quantized"):
        export_onnx(make_vit(), tmp_path / "model")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_the_missing_extra_is_named(
    package: str, models: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AdfqError, match=rf"exporting needs {package}: pip install 'adfq\[onnx\]'"):
        export_onnx(models["base_ptq"], tmp_path / "model")


def test_nothing_is_left_of_what_fails(
    models: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["base_ptq"]
    with pytest.raises(AdfqError, match=r"cannot write .*no/model: there is no directory"):
        export_onnx(model, tmp_path / "no" / "model")
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", lambda self, x: x[x > x.mean()].reshape(2, -1).tolist())
        with pytest.raises(AdfqError, match=r"cannot trace this VisionTransformer: \S") as caught:
            export_onnx(model, tmp_path / "model")
        assert str(caught.value).isprintable()  # without a terminal's codes
        assert "Failed to export the model" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["base_ptq", "repq_vit"])
@pytest.mark.parametrize("name", ["bundled_vit", "bundled_swin"])
def test_predictions_are_those_of_the_simulation(name: str, method: str, tmp_path: Path) -> None:
    cell = Cell.create(task="classification", model=name, method=method, data="bundled")
    subject = load_subject(cell)
    model = quantize(subject.model, method, 8, 8, next(subject.calibration_batches(32, seed=1)))
    file = tmp_path / "model"
    exported = export_onnx(model, file)
    assert deployment.count_integer_products(file) == len(exported.integer)
    assert all("context" in product for product in exported.floating)
    # All of them: of a few hundred, chance can take one percent.
    batches = subject.evaluation_images(2000).split(200)
    with torch.inference_mode():
        simulated, predicted = (
            torch.cat([module(images).argmax(1) for images in batches])
            for module in (model, deployment.OnnxModel(file))
        )
    assert (simulated == predicted).double().mean() >= 0.99
