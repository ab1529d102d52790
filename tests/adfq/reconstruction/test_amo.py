"""AMO and its parts: losses, what is trained, seeds, and going on after an interruption."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt
from adfq.adfq_vit import ADFQViT
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.calibration.walk import Part
from adfq.layers import QuantWeightLayer
from adfq.method import Run
from adfq.quantizers import PerPatchOutlierQuantizer, Quantizer, UniformQuantizer
from adfq.quantizers.adaround import AdaRound
from adfq.reconstruction import Batch, Roundings, Unit
from adfq.reconstruction.examples import Examples, inputs_in
from adfq.reconstruction.optimizer import Reconstruction
from adfq.reconstruction.trained import learned_quantizers, mean_step
from adfq.sites import Network

QUICK: dict[str, Any] = {
    "iterations": 12,
    "optimize_batch_size": 4,
    "rounding_learning_rate": 3e-2,
    "step_learning_rate": 1e-3,
}

pytestmark = pytest.mark.filterwarnings("ignore:optimization made these modules no better")


@pytest.fixture(params=["vit", "swin"])
def model(request: pytest.FixtureRequest, make_vit: Any, make_swin: Any) -> nn.Module:
    made: nn.Module = {"vit": make_vit, "swin": make_swin}[request.param]()
    return made


def optimize(model: nn.Module, images: Tensor, bits: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    return adfq.quantize(model, "adfq_vit", bits, bits, images, seed, **(QUICK | options))


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: layer.weight_quantizer.encode(layer.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantWeightLayer) and isinstance(layer.weight_quantizer, UniformQuantizer)
    }


def steps(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.scale
        for name, module in model.named_modules()
        if isinstance(module, Quantizer) and not name.endswith("weight_quantizer")
    }


def report(model: nn.Module) -> dict[str, dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = model.quantization.report["modules"]  # type: ignore[union-attr, assignment]
    return modules


# AdaRound


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_adaround_agrees_with_released_code(load_golden: Callable[[str], dict[str, Tensor]], bits: int) -> None:
    case = {
        key.rpartition("/")[2]: value
        for key, value in load_golden("adfq_quantizers_11.npz").items()
        if key.startswith(f"adaround/w{bits}/")
    }
    grid = UniformQuantizer(bits, "row")
    grid.scale, grid.zero_point = case["scale"], case["zero_point"]
    rounding = AdaRound(case["x"], grid)
    torch.testing.assert_close(rounding.alpha.detach(), case["alpha"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(rounding.soft().detach(), case["y_soft"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rounding.hard(), case["y_hard"], rtol=1e-5, atol=1e-6)
    rounding.alpha.data.copy_(case["alpha2"])
    torch.testing.assert_close(rounding.soft().detach(), case["y2_soft"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rounding.hard(), case["y2_hard"], rtol=1e-5, atol=1e-6)


@pytest.fixture
def rounding() -> AdaRound:
    weight = torch.randn(6, 9)
    grid = UniformQuantizer(3, "row", "percentile").calibrate(weight)
    made = AdaRound(weight, grid)
    made.alpha.data.add_(torch.randn(6, 9))
    return made


def test_adaround_starts_at_the_weight_and_rounds_it_to_nearest() -> None:
    weight = torch.randn(6, 9)
    grid = UniformQuantizer(4, "row").calibrate(weight)
    made = AdaRound(weight, grid)
    lowest, highest = (grid.scale * (code - grid.zero_point) for code in (0, grid.levels - 1))
    inside = (weight >= lowest) & (weight <= highest)
    torch.testing.assert_close(made.soft()[inside], weight[inside], rtol=1e-5, atol=1e-6)
    assert torch.equal(made.hard(), grid(weight))


def test_adaround_gradients_are_those_of_its_formula(rounding: AdaRound) -> None:
    alpha = rounding.alpha.detach().double().requires_grad_()
    h = (1.2 * alpha.sigmoid() - 0.1).clamp(0, 1)
    soft = ((rounding.floor + h).clamp(0, 7) - rounding.zero_point) * rounding.scale
    regularizer = (1 - (2 * h - 1).abs() ** 5.0).sum()
    factors = torch.randn(6, 9)
    (soft * factors).sum().add(regularizer).backward()
    (rounding.soft() * factors).sum().add(rounding.regularizer(5.0)).backward()
    torch.testing.assert_close(rounding.soft().double(), soft, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rounding.regularizer(5.0).double(), regularizer, rtol=1e-5, atol=1e-5)
    assert rounding.alpha.grad is not None
    torch.testing.assert_close(rounding.alpha.grad.double(), alpha.grad, rtol=1e-4, atol=1e-6)


def test_decided_roundings_are_not_regularized(rounding: AdaRound) -> None:
    rounding.alpha.data.sign_().mul_(20)
    assert rounding.regularizer(2.0).item() == 0
    assert torch.equal(rounding.soft(), rounding.hard())


# Modules


def test_modules_hold_every_layer_and_matmul_once(model: nn.Module) -> None:
    network = adapt(model)
    parts = [*network.weight_layers(), *network.matmuls()]
    for name, _ in parts:
        assert sum(f"{name}.".startswith(f"{module}.") for module in network.units) == 1, name


def test_optimization_lowers_every_modules_error(model: nn.Module, make_images: Any) -> None:
    images = make_images(16)
    optimized = optimize(model, images, iterations=80)
    modules = report(optimized)
    assert next(iter(modules)) == "patch_embed"
    assert set(modules) == set(adapt(copy.deepcopy(model)).units)
    assert all(module["after"] < module["before"] for module in modules.values() if module["kept"])
    assert sum(module["kept"] for module in modules.values()) >= len(modules) - 1
    calibrated = adfq.quantize(model, "adfq_vit", 3, 3, images, iterations=0)
    with torch.no_grad():
        target = model(images)
        assert (optimized(images) - target).norm() < 0.85 * (calibrated(images) - target).norm()


def test_without_iterations_modules_are_as_calibrated_in_one_pass(model: nn.Module, make_images: Any) -> None:
    images = make_images(8)
    calibrated = adfq.quantize(model, "adfq_vit", 4, 4, images, iterations=0)
    # All images in one batch, since a dynamic shift depends on what is in the batch.
    still = optimize(
        model, images, 4, optimize_batch_size=8, rounding_learning_rate=0, step_learning_rate=0, iterations=1
    )
    with torch.no_grad():
        torch.testing.assert_close(still(images), calibrated(images), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(scale, steps(still)[name]) for name, scale in list(steps(calibrated).items())[:3])


def test_hooks_are_gone_and_the_given_model_is_untouched(model: nn.Module, make_images: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = optimize(model, make_images(8), iterations=2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in optimized.modules())
    assert not any(tensor.requires_grad for tensor in optimized.buffers())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_stay_on_the_calibrated_grid(model: nn.Module, make_images: Any) -> None:
    optimized = optimize(model, make_images(8))
    for name, layer in optimized.named_modules():
        if isinstance(layer, QuantWeightLayer):
            quantizer = layer.weight_quantizer
            assert isinstance(quantizer, UniformQuantizer)
            assert torch.equal(quantizer.decode(quantizer.encode(layer.weight)), layer.weight), name


# Options


def test_learning_rates_of_zero_switch_parts_off(model: nn.Module, make_images: Any) -> None:
    images = make_images(8)
    calibrated = adfq.quantize(model, "adfq_vit", 3, 3, images, iterations=0)
    rounding_alone = optimize(model, images, step_learning_rate=0)
    steps_alone = optimize(model, images, rounding_learning_rate=0)
    first = "patch_embed.proj"
    assert all(torch.equal(code, codes(calibrated)[name]) for name, code in codes(steps_alone).items())
    assert any(not torch.equal(code, codes(calibrated)[name]) for name, code in codes(rounding_alone).items())
    assert torch.equal(steps(rounding_alone)[f"{first}.input_quantizer"], steps(calibrated)[f"{first}.input_quantizer"])
    assert any(not torch.equal(scale, steps(calibrated)[name]) for name, scale in steps(steps_alone).items())


def reconstruct(model: nn.Module, images: Tensor, name: str, **options: Any) -> Reconstruction:
    """The reconstruction of one module, calibrated, on the way as `optimize_units` makes it."""
    network = adapt(model)
    ADFQViT(iterations=0).apply(network, Run(CalibrationImages([images])), Bits(3, 3))
    network.model.requires_grad_(False)
    module = network.model.get_submodule(name)
    method = ADFQViT(**QUICK | options)
    with torch.no_grad():
        (call,) = Part("", [len(images)], lambda _: network.model(images)).calls(module)
        inputs = inputs_in(call, len(images), module)
        examples = Examples(call, inputs, {key: 1.1 * x for key, x in inputs.items()}, count=len(images))
        places = torch.tensor([[0, index] for index in range(len(images))])
        unit = Unit(network, name, [examples], places, [len(images)], method.optimize_batch_size)
        unit.set_targets(module, unit.sites)
        return Reconstruction(unit, method, method.composition())


def batch_of(parts: Reconstruction, images: int = 4) -> Batch:
    return Batch(parts.unit.examples[0], torch.arange(images))


def test_the_attention_term_compares_distributions_over_keys(make_vit: Any, make_images: Any) -> None:
    images = make_images(4)
    parts = reconstruct(make_vit(), images, "blocks.0.attn", attention_weight=10.0, temperature=4.0)
    plain = reconstruct(make_vit(), images, "blocks.0.attn", attention_weight=0.0)
    loss: Any = parts.losses[1]
    assert plain.losses[1].target_scores(batch_of(plain)) == []  # type: ignore[attr-defined]
    (target,) = loss.target_scores(batch_of(parts))
    torch.testing.assert_close(target.sum(-1), torch.ones_like(target.sum(-1)))
    with loss.scores() as scores:
        parts.unit.forward(batch_of(parts), parts.unit.examples[0].inputs)
    chosen = scores[0].double()
    wanted = target.double()
    divergence = torch.nn.functional.kl_div((chosen / 4).log_softmax(-1), wanted, reduction="none").sum((0, 1, 2, 3))
    entropy = -(wanted * wanted.log()).sum()
    heads = chosen.shape[0] * chosen.shape[1]
    measured = loss.divergence(scores[0], target).double()
    torch.testing.assert_close(measured, (divergence + entropy) / heads, rtol=1e-5, atol=1e-6)


def test_no_step_size_is_learned_faster_than_a_hundredth_of_itself(make_vit: Any, make_images: Any) -> None:
    parts = reconstruct(make_vit(), make_images(4), "blocks.0.mlp", iterations=1, step_learning_rate=1.0)
    before = {name: quantizer.scale.clone() for name, quantizer in parts.unit.quantizers.items()}
    with torch.no_grad():
        parts.prepare()
        parts.optimize(lambda: None)
    for name, quantizer in parts.unit.quantizers.items():
        change = (quantizer.scale - before[name]).abs() / before[name].mean()
        assert 0 < change.max() <= 0.0101, name


def test_inputs_are_mixed_element_by_element(make_vit: Any, make_images: Any) -> None:
    seen: list[Tensor] = []
    for probability, expected in ((0.0, [1.0]), (1.0, [1.1]), (0.5, [1.0, 1.1])):
        parts = reconstruct(make_vit(), make_images(4), "blocks.0.mlp", mix_probability=probability)
        (examples,) = parts.unit.examples
        examples.inputs = {0: torch.ones_like(examples.inputs[0])}
        examples.quantized_inputs = {0: torch.full_like(examples.inputs[0], 1.1)}
        hook = parts.unit.module.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        parts.loss(0.0)
        hook.remove()
        values, counts = seen.pop().unique(return_counts=True)
        assert values.tolist() == pytest.approx(expected)
        assert counts.min() > 0.4 * counts.sum() or len(expected) == 1


def test_rounding_is_regularized_after_the_warm_up(make_vit: Any, make_images: Any) -> None:
    parts = reconstruct(make_vit(), make_images(4), "blocks.0.mlp", mix_probability=1.0, optimize_batch_size=4)
    learned = Roundings(parts.unit, 1e-3, 0.01)
    learned.roundings = learned.roundings[:1]
    parts.trained = [learned]
    quiet, early, late = (parts.loss(progress).item() for progress in (0.0, 0.2, 0.9))
    regularizers = [0.01 * learned.roundings[0][1].regularizer(beta).item() for beta in (20.0, 20 - 18 * 0.7 / 0.8)]
    assert [early - quiet, late - quiet] == pytest.approx(regularizers, rel=1e-3)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(("unit", "last"), [("blocks.0.attn", "proj"), ("blocks.0.mlp", "fc2")])
def test_released_lets_no_gradient_through_quantizers(
    released: bool, unit: str, last: str, make_vit: Any, make_images: Any
) -> None:
    parts = reconstruct(make_vit(), make_images(4), unit, released=released, attention_weight=0.0)
    learned = Roundings(parts.unit, 1e-3, 0.01)
    parts.trained = [learned]
    with parts._differentiable():
        parts.loss(0.0).backward()
    roundings = zip(parts.unit.layers, learned.roundings, strict=True)
    gradients = {name: rounding.alpha.grad for name, (_, rounding) in roundings}
    assert gradients.pop(last).abs().sum() > 0
    (first,) = gradients.values()
    assert first is None or not first.any() if released else first.abs().sum() > 0


@pytest.mark.parametrize("make", [lambda: UniformQuantizer(4), lambda: PerPatchOutlierQuantizer(4, 1.5)])
def test_without_straight_through_a_step_gets_the_gradient_of_its_codes(make: Callable[[], UniformQuantizer]) -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer = make().calibrate(x)
    quantizer.straight_through = False
    quantizer.scale.requires_grad_(True)
    out = quantizer(x)
    out.sum().backward()
    kept = x.abs() > 1.5 if isinstance(quantizer, PerPatchOutlierQuantizer) else torch.zeros_like(x, dtype=torch.bool)
    gradient = torch.zeros_like(x) if x.grad is None else x.grad
    assert torch.equal(gradient, kept.float())  # outliers are not rounded
    steps = torch.where(kept, 0.0, out.detach() / quantizer.scale.detach())
    torch.testing.assert_close(quantizer.scale.grad, steps.sum_to_size(quantizer.scale.shape), rtol=1e-4, atol=1e-4)


def test_released_learns_no_steps_of_matrix_products(make_vit: Any, make_images: Any) -> None:
    parts = reconstruct(make_vit(), make_images(4), "blocks.0.attn", released=True, iterations=3)
    before = {name: quantizer.scale.clone() for name, quantizer in parts.unit.quantizers.items()}
    with torch.no_grad():
        parts.prepare()
        parts.optimize(lambda: None)
    moved = {
        name for name, quantizer in parts.unit.quantizers.items() if not torch.equal(quantizer.scale, before[name])
    }
    # The step before qkv is learned too, but query, key and value pass it no gradient.
    assert moved == {"blocks.0.attn.proj.input_quantizer"}
    assert (len(before), len(learned_quantizers(parts.unit, products=False))) == (6, 2)


def test_released_draws_with_replacement_and_keeps_every_state(
    make_vit: Any, make_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = reconstruct(make_vit(), make_images(4), "blocks.0.mlp", released=True, optimize_batch_size=64)
    _, chosen = parts.draw()
    assert (len(chosen), sorted(set(chosen.tolist()))) == (64, [0, 1, 2, 3])
    errors = iter([1.0, 2.0])
    monkeypatch.setattr(parts, "error", lambda: next(errors))
    with torch.no_grad():
        assert parts.run(lambda: None).kept


def test_released_compares_probabilities_over_heads(make_vit: Any, make_images: Any) -> None:
    parts = reconstruct(make_vit(), make_images(4), "blocks.0.attn", released=True)
    loss: Any = parts.losses[1]
    (target,) = loss.target_scores(batch_of(parts))
    torch.testing.assert_close(target.sum(1), torch.ones_like(target.sum(1)))
    scores = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    quantized, expected = loss.distribution(scores).double(), target.double()
    divergence = (quantized * (quantized / expected).log()).sum() / len(scores)
    torch.testing.assert_close(loss.divergence(scores, target).double(), divergence, rtol=1e-3, atol=0)
    assert torch.isfinite(parts.loss(0.5))


def test_held_back_images_decide_when_to_stop_and_what_is_kept(
    make_vit: Any, make_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = reconstruct(make_vit(), make_images(16), "blocks.0.mlp", iterations=100, held_back=0.25)
    assert (parts.trained_on.tolist(), parts.judged_on.tolist()) == (list(range(12)), list(range(12, 16)))
    # As if every state after the second check, at 25 iterations, were worse.
    errors = iter([3.0, 2.0, *(4.0,) * 20])
    states: list[dict[str, Tensor]] = []

    def error() -> float:
        states.append(parts.unit.state())
        return next(errors)

    monkeypatch.setattr(parts, "error", error)
    done: list[int] = []
    with torch.no_grad():
        parts.prepare()
        parts.optimize(lambda: done.append(1))
    assert len(done) == 25 + 4 * 5
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in parts.unit.state().items())
    assert any(not torch.equal(tensor, states[-1][key]) for key, tensor in parts.unit.state().items())


def test_a_module_that_gets_worse_stays_as_calibrated_and_says_so(model: nn.Module, make_images: Any) -> None:
    images = make_images(8)
    with pytest.warns(UserWarning, match=r"no better, they stay as calibrated: .*patch_embed"):
        spoilt = optimize(model, images, iterations=3, rounding_learning_rate=100.0, step_learning_rate=10.0)
    calibrated = adfq.quantize(model, "adfq_vit", 3, 3, images, iterations=0)
    for name, module in report(spoilt).items():
        if not module["kept"]:
            assert module["after"] >= module["before"]
            same = [key for key in codes(spoilt) if f"{key}.".startswith(f"{name}.")]
            assert all(torch.equal(codes(spoilt)[key], codes(calibrated)[key]) for key in same)


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": -1},
        {"iterations": 2.5},
        {"optimize_batch_size": 0},
        {"mix_probability": 1.5},
        {"temperature": 0},
        {"held_back": 0.9},
        {"rounding_learning_rate": -1.0},
        {"attention_weight": "much"},
        {"step_learning_rate": float("nan")},
    ],
)
def test_bad_settings_are_one_clear_line(make_vit: Any, make_images: Any, options: dict[str, Any]) -> None:
    with pytest.raises(AdfqError, match=next(iter(options))):
        optimize(make_vit(), make_images(4), **options)


# The same bits again


def test_the_seed_decides_every_bit(model: nn.Module, make_images: Any) -> None:
    images = make_images(8)
    first, torch.random_state = optimize(model, images), torch.get_rng_state()  # type: ignore[attr-defined]
    torch.manual_seed(99)
    again, other = optimize(model, images), optimize(model, images, seed=1)
    with torch.no_grad():
        assert torch.equal(first(images), again(images))
        assert not torch.equal(first(images), other(images))


class _StopError(Exception):
    pass


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Makes optimization stop after so many modules; gives the list of those that are run from then on."""
    ran: list[str] = []
    original = Reconstruction.run

    def run(self: Any, done: Any) -> Any:
        if len(ran) == after:
            raise _StopError
        ran.append(type(self.unit.module).__name__)
        return original(self, done)

    monkeypatch.setattr(Reconstruction, "run", run)
    return ran


def test_an_interrupted_optimization_goes_on_after_the_last_finished_module(
    model: nn.Module, make_images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(8)
    whole = optimize(model, images)
    with monkeypatch.context() as patch:
        interrupted(patch, after=3)
        with pytest.raises(_StopError):
            optimize(model, images, resume=tmp_path / "unfinished")
    with monkeypatch.context() as patch:
        ran = interrupted(patch, after=1000)
        resumed = optimize(model, images, resume=tmp_path / "unfinished")
    assert len(ran) == len(report(whole)) - 3
    assert report(resumed) == report(whole)
    with torch.no_grad():
        assert torch.equal(resumed(images), whole(images))


@pytest.mark.parametrize("change", ["images", "options", "weights", "bits", "seed"])
def test_what_others_left_is_not_resumed_from(
    make_vit: Any, make_images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model, images = make_vit(depth=1), make_images(4)
    optimize(model, images, resume=tmp_path)
    ran = interrupted(monkeypatch, after=1000)
    if change == "weights":
        model.head.bias.data[0] += 1e-3
    optimize(
        model,
        make_images(4, seed=2) if change == "images" else images,
        4 if change == "bits" else 3,
        seed=1 if change == "seed" else 0,
        resume=tmp_path,
        **({"temperature": 2.0} if change == "options" else {}),
    )
    assert len(ran) == 4


@pytest.mark.parametrize("damage", [b"", b"nothing of that kind", None])
def test_a_damaged_rest_is_done_again(
    make_vit: Any, make_images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    model, images = make_vit(depth=1), make_images(4)
    whole = optimize(model, images, resume=tmp_path)
    file = tmp_path / "blocks.0.mlp.safetensors"
    file.write_bytes(file.read_bytes()[:-50] if damage is None else damage)
    ran = interrupted(monkeypatch, after=1000)
    again = optimize(model, images, resume=tmp_path)
    assert ran == ["Mlp"]
    with torch.no_grad():
        assert torch.equal(again(images), whole(images))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 4


def test_a_folder_that_cannot_be_written_is_one_clear_line(make_vit: Any, make_images: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdfqError, match=r"cannot write to .*file"):
        optimize(make_vit(), make_images(4), resume=tmp_path / "file")


# Numbers of other kinds


def test_autocast_and_half_precision(make_vit: Any, make_images: Any) -> None:
    images = make_images(8)
    model = make_vit()
    optimized = optimize(model, images, iterations=40, autocast=True)
    assert sum(module["kept"] for module in report(optimized).values()) >= len(report(optimized)) - 1
    low = optimize(model.bfloat16(), images, iterations=4)
    assert torch.isfinite(low(images.bfloat16())).all()


def test_modules_outside_the_forward_pass_are_left_alone(make_vit: Any, make_images: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: Network = adapt(make_vit())
        run = Run(CalibrationImages([make_images(4)]))
        ADFQViT(**QUICK | {"iterations": 1}).apply(network, run, Bits(4, 4))
    assert list(run.report["modules"]) == list(network.units)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_optimizes_too(model: nn.Module, make_images: Any) -> None:
    optimized = optimize(model.cuda(), make_images(8), iterations=40)
    assert sum(module["kept"] for module in report(optimized).values()) >= len(report(optimized)) - 1


def test_a_dead_position_does_not_raise_the_learning_rate_of_steps() -> None:
    x = 0.01 * torch.randn(2, 3, 4)
    live = PerPatchOutlierQuantizer(4, 5.0).calibrate(x)
    x = torch.cat([x, torch.zeros(2, 1, 4)], 1)
    assert mean_step(PerPatchOutlierQuantizer(4, 5.0).calibrate(x)) == pytest.approx(live.scale.mean().item())
