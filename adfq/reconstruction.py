"""Unit-wise optimization after calibration: ADFQ-ViT's attention-score enhanced module-wise optimization (AMO).

Unit after unit in the order of the forward pass, weights learn to round up or down and activation quantizers learn
their step size, so that the unit's output is that of full precision. Sources: ADFQ-ViT, section "attention-score
enhanced module-wise optimization"; AdaRound, Nagel et al., 2020; learned step size, Esser et al., 2020; mixed inputs,
QDrop, Wei et al., 2022.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adfq.calibration import calibrating, progress_bar
from adfq.calibration.finished import Finished
from adfq.calibration.passes import calibrate_part, pinned
from adfq.calibration.walk import Call, Enough, Part, Walk, with_checked_trunk
from adfq.errors import AdfqError
from adfq.layers import QuantConv2d, QuantMatMul, QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import Quantizer, UniformQuantizer
from adfq.quantizers.adaround import AdaRound
from adfq.sites import Network, full_precision, is_within, sites_of

_WARM_UP = 0.2  # share of the iterations before rounding is regularized
_BETA = (20.0, 2.0)  # the regularizer's exponent, from and to
_MIN_STEP = 1e-2  # a learned step size never falls below this share of the calibrated one
_MAX_RATE = 1e-2  # nor is its learning rate above this share of it: steps at 8 bits are small
_CHECKS = 20  # greatest number of evaluations on the held-back images
_PATIENCE = 4  # number of checks in a row without improvement that ends the optimization


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of the optimization of units; defaults are the paper's.

    Attributes:
        iterations: iterations for each unit; 0 leaves it calibrated.
        optimize_batch_size: images in an iteration.
        mix_probability: probability that an element of a unit's input is the quantized network's and not full
            precision's.
        attention_weight: weight of the divergence between attention scores, in the loss of units with a softmax.
        temperature: temperature of that divergence.
        rounding_weight: weight of the regularizer that drives roundings to a decision.
        rounding_learning_rate: learning rate of AdaRound's α (Adam); 0 keeps weights rounded to nearest.
        step_learning_rate: learning rate of activation step sizes (Adam, cosine to 0), limited to a hundredth of the
            step size; 0 keeps the calibrated ones.
        held_back: share of the images that is not optimized on and decides when to stop and which state is kept.
        autocast: True to run units in bfloat16.
        released: True for the released code's peculiarities. Attention scores are compared by a softmax over heads of
            probabilities, and by KL(quantized ‖ full precision). Activation quantizers pass no gradient to their input.
            The step sizes of query, key, probabilities and value are not learned. Batches are drawn with replacement.
            The optimized state is kept, whatever its error.

    Raises:
        AdfqError: for a value out of range.
    """

    iterations: int = 3000
    optimize_batch_size: int = 32
    mix_probability: float = 0.5
    attention_weight: float = 10.0
    temperature: float = 4.0
    rounding_weight: float = 0.01
    rounding_learning_rate: float = 3e-3
    step_learning_rate: float = 4e-5
    held_back: float = 0.0
    autocast: bool = False
    released: bool = False

    def __post_init__(self) -> None:
        for name, lowest in (("iterations", 0), ("optimize_batch_size", 1)):
            if not isinstance(value := getattr(self, name), int) or value < lowest:
                raise AdfqError(f"{name} must be a whole number of at least {lowest}, got {value!r}")
        for name, highest in (
            ("mix_probability", 1.0),
            ("held_back", 0.5),
            ("attention_weight", math.inf),
            ("rounding_weight", math.inf),
            ("rounding_learning_rate", math.inf),
            ("step_learning_rate", math.inf),
        ):
            if not isinstance(value := getattr(self, name), (int, float)) or not 0 <= value <= highest:
                raise AdfqError(f"{name} must be a number from 0 to {highest}, got {value!r}")
        if not isinstance(self.temperature, (int, float)) or not self.temperature > 0:
            raise AdfqError(f"temperature must be above 0, got {self.temperature!r}")


@dataclass(frozen=True)
class OptimizingMethod(OptimizerOptions, Method):
    """Method that reconstructs units after calibration; ``iterations=0`` leaves them calibrated."""


@dataclass(frozen=True)
class Result:
    """Outcome of a unit's optimization.

    The error is that of the reconstruction: squared, summed over dimension 1 (tokens), mean over the rest. It is taken
    on the held-back images, or on all without any.

    Attributes:
        before: error of the calibrated unit.
        after: error of the optimized unit.
        kept: True if the unit has the optimized state; False if that was no better.
    """

    before: float
    after: float
    kept: bool


def optimize_units(network: Network, run: Run, options: OptimizerOptions) -> dict[str, Result]:
    """Calibrate and optimize unit after unit of a network with quantized weights.

    Full precision and the quantized network walk side by side: every unit finds its inputs in both, is calibrated and
    optimized. Memory holds these inputs and the targets of one unit for all images, and a batch of everything else. A
    run with a folder to resume from leaves finished units there, and does not optimize them again.

    Args:
        network: network with quantizers attached and weights quantized; its parameters get no gradients any more.
        run: calibration images, and the folder to resume from.
        options: options of the optimization.

    Returns:
        Outcome of each unit by name, in the order of the forward pass.

    Raises:
        NonFiniteError: for activations that hold NaN or infinity; the message names the site.
        AdfqError: for a folder that cannot be written.
    """
    network.model.requires_grad_(False)
    # A seed for each module, so that what one draws does not depend on those before it.
    seeds = torch.randint(2**62, (len(network.units),)).tolist()
    finished = Finished(run.images.folder, network, run.images, f"{options} {seeds}")
    # Both versions of the network walk in batches of the optimization's size.
    images = run.images.split(options.optimize_batch_size)
    walked = with_checked_trunk(network, images)
    walks = Walk(walked, images, full_precision=True), Walk(walked, images)
    results: dict[str, Result] = {}

    def optimize(name: str, seed: int, parts: Sequence[Part]) -> None:
        progress.set_description(f"optimizing {name}")
        torch.manual_seed(seed)
        examples, places = _collect(network.model.get_submodule(name), walks, parts)
        unit = _Reconstruction(network, name, examples, places, run.images.sizes, options, run.images.folder)
        known = finished.restore(name)
        if known is None:
            results[name] = unit.run(progress.update)
            finished.keep(name, unit.state(), asdict(results[name]))
        else:
            unit.load_state(known[0])
            results[name] = Result(**known[1])
        progress.set_postfix_str(f"error {results[name].before:.3g} → {results[name].after:.3g}")

    with progress_bar("optimizing modules", len(network.units) * options.iterations) as progress, torch.no_grad():
        for parts in zip(*(walk.parts() for walk in walks), strict=True):
            for name, seed in zip(network.units, seeds, strict=True):
                if name not in results and is_within(name, parts[0].name):
                    optimize(name, seed, parts)
    worse = [name for name, result in results.items() if not result.kept]
    if worse:
        warnings.warn(
            f"optimization made these modules no better, they stay as calibrated: {', '.join(worse)}", stacklevel=2
        )
    return results


@dataclass
class _Examples:
    """Inputs and targets of a unit for images of one size, on the host.

    Tensors are B×k×…, with k rows of the unit's input for each image (Swin's windows). Inputs are all tensor arguments
    with as many rows as the first, by position or keyword: cross-attention has three. Keywords in the unit's
    `shared_arguments` are not among them.

    Attributes:
        call: the unit's arguments for some images; all but the inputs are those of every image.
        inputs: inputs in full precision.
        quantized_inputs: inputs in the quantized network.
        targets: outputs in full precision.
        count: number of images.
    """

    call: Call
    inputs: dict[int | str, Tensor]
    quantized_inputs: dict[int | str, Tensor]
    targets: Tensor = field(default_factory=lambda: torch.empty(0))
    count: int = 0

    def takes(self, call: Call, inputs: Mapping[int | str, Tensor]) -> bool:
        """Return True if a batch with such inputs may join: a mask, say, depends on the images' height and width."""
        known, others = (
            [(key, value) for key, value in _by_key(*arguments) if key not in inputs] for arguments in (self.call, call)
        )
        shapes = [{key: tensor.shape[1:] for key, tensor in tensors.items()} for tensors in (self.inputs, inputs)]
        return shapes[0] == shapes[1] and _is_same(known, others)


def _is_same(first: Any, second: Any) -> bool:
    """Return True for equal nested tuples, lists and dictionaries of tensors and anything else."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return _is_same(list(first.items()), list(second.items()))
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(_is_same, first, second))
    return first is second or bool(first == second)


def _inputs_in(call: Call, images: int, shared: Sequence[str]) -> dict[int | str, Tensor]:
    # Rotary positions, say, may have as many rows by chance.
    tensors = {key: value for key, value in _by_key(*call) if isinstance(value, Tensor) and key not in shared}
    rows = len(next(iter(tensors.values())))
    return {
        key: tensor.unflatten(0, (images, -1))
        for key, tensor in tensors.items()
        if tensor.dim() and len(tensor) == rows
    }


def _room(inputs: Mapping[int | str, Tensor], images: int) -> dict[int | str, Tensor]:
    """Return room on the host for the inputs of so many images; what is never written to takes no memory."""
    return {key: torch.empty(images, *tensor.shape[1:], dtype=tensor.dtype) for key, tensor in inputs.items()}


def _collect(unit: nn.Module, walks: Sequence[Walk], parts: Sequence[Part]) -> tuple[list[_Examples], Tensor]:
    """Return a unit's inputs in both versions of the network.

    Returns:
        Examples for each size of images, and the place of each image: the index of its examples and that among them.
    """
    shared = getattr(unit, "shared_arguments", ())
    examples: list[_Examples] = []
    places: list[Tensor] = []
    total = sum(parts[0].sizes)
    for index, (walk, part) in enumerate(zip(walks, parts, strict=True)):
        with walk.mode():
            for batch, (images, call) in enumerate(zip(part.sizes, part.calls(unit), strict=True)):
                inputs = _inputs_in(call, images, shared)
                if not index:
                    places.append(_place(examples, call, inputs, images, total))
                which, first = places[batch][0].tolist()
                found = examples[which].quantized_inputs if index else examples[which].inputs
                for key, tensor in inputs.items():
                    found[key][first : first + images] = tensor
    return examples, torch.cat(places)


def _place(
    examples: list[_Examples], call: Call, inputs: Mapping[int | str, Tensor], images: int, total: int
) -> Tensor:
    """Return the place of a batch's images, among examples with such inputs and the same other arguments."""
    index, fit = next(((i, found) for i, found in enumerate(examples) if found.takes(call, inputs)), (-1, None))
    if fit is None:
        index, fit = len(examples), _Examples(call, _room(inputs, total), _room(inputs, total))
        examples.append(fit)
    place = torch.arange(fit.count, fit.count + images)
    fit.count += images
    return torch.stack([torch.full_like(place, index), place], 1)


class _Reconstruction:
    """Unit with all data of its optimization.

    Args:
        network: network with the unit.
        name: name of the unit.
        examples: its inputs for each size of images.
        places: index of each image's examples, and its index among them; N×2.
        sizes: numbers of images that are calibrated on at once.
        options: options of the optimization.
        folder: folder for what waits; None, the default, for the system's temporary one.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        examples: list[_Examples],
        places: Tensor,
        sizes: Sequence[int],
        options: OptimizerOptions,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        self.model, self.name, self.module = network.model, name, network.model.get_submodule(name)
        self.options, self.examples, self.places, self.sizes = options, examples, places, sizes
        self.device = next(network.model.parameters()).device
        modules = self.module.named_modules()
        self.layers = {key: layer for key, layer in modules if isinstance(layer, QuantWeightLayer)}
        self.sites = list(sites_of(network.model, name))
        self.quantizers = network.activation_quantizers(name)
        softmaxes = [module for module in self.module.modules() if isinstance(module, nn.Softmax)]
        self.softmaxes = softmaxes if options.attention_weight else []
        self.channels_first = any(isinstance(layer, QuantConv2d) for layer in self.layers.values())
        images = len(places)
        with full_precision(self.sites):
            for found, chosen in self._batches(torch.arange(images)):
                output = self._forward(found, found.inputs, chosen).unflatten(0, (len(chosen), -1))
                if not found.targets.numel():
                    found.targets = torch.empty(found.count, *output.shape[1:], dtype=output.dtype)
                found.targets[chosen] = output.to(found.targets.device)
        held_back = round(options.held_back * images)
        self.trained_on, self.judged_on = torch.arange(images).tensor_split([images - held_back])
        if not held_back:
            self.judged_on = self.trained_on

    def _batches(self, images: Tensor) -> Iterator[tuple[_Examples, Tensor]]:
        """Yield images in batches of the optimization's size: examples, and indices among them."""
        for found, chosen in self._by_examples(images):
            for part in chosen.split(self.options.optimize_batch_size):
                yield found, part

    def _by_examples(self, images: Tensor) -> Iterator[tuple[_Examples, Tensor]]:
        """Yield examples, and the images among them as indices of theirs."""
        which, place = self.places[images].unbind(1)
        for index, found in enumerate(self.examples):
            if len(chosen := place[which == index]):
                yield found, chosen

    def _forward(self, examples: _Examples, inputs: Mapping[int | str, Tensor], chosen: Tensor) -> Tensor:
        return self._run(examples, {key: tensor[chosen] for key, tensor in inputs.items()})

    def _run(self, examples: _Examples, inputs: Mapping[int | str, Tensor]) -> Tensor:
        rows = {key: tensor.flatten(0, 1).to(self.device) for key, tensor in inputs.items()}
        arguments, keywords = _replace(*examples.call, rows)
        output: Tensor = self.module.forward(*arguments, **keywords)
        return output

    def _squared_error(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the squared error, summed over tokens (channels of a convolution), mean over the rest."""
        error = (output.float() - target.float()).square()
        if error.dim() > 3 and not self.channels_first:
            error = error.flatten(1, -2)
        return error.sum(1).mean()

    @contextmanager
    def _scores(self, alone: bool = False) -> Iterator[list[Tensor]]:
        """Collect the input of every softmax of the unit inside the block, or in a pass that is for these alone."""
        found: list[Tensor] = []

        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            if alone and len(found) == len(self.softmaxes):
                raise Enough

        hooks = [softmax.register_forward_pre_hook(collect) for softmax in self.softmaxes]
        try:
            yield found
        except Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _target_scores(self, examples: _Examples, chosen: Tensor) -> list[Tensor]:
        """Return the distributions of attention in full precision, which memory has no room for of all images."""
        if not self.softmaxes:
            return []
        with full_precision(self.sites), self._scores(alone=True) as found:
            self._forward(examples, examples.inputs, chosen)
        return [self._distribution(score) for score in found]

    def _distribution(self, scores: Tensor) -> Tensor:
        if self.options.released:
            return (scores.float().softmax(-1) / self.options.temperature).softmax(1)
        return (scores.float() / self.options.temperature).softmax(-1)

    def run(self, done: Callable[[], object]) -> Result:
        """Calibrate and optimize the unit."""
        self._calibrate()
        calibrated, before = self.state(), self._error()
        self._optimize(done)
        after = self._error()
        kept = self.options.released or after < before
        if not kept:
            self.load_state(calibrated)
        return Result(before, after, kept)

    def _calibrate(self) -> None:
        batches = [
            batch
            for images in torch.arange(len(self.places)).split(list(self.sizes))
            for batch in self._by_examples(images)
        ]

        def run(batch: int) -> Tensor:
            examples, chosen = batches[batch]
            return self._forward(examples, examples.quantized_inputs, chosen)

        if len(batches) == 1:
            with calibrating(self.quantizers.items()):
                run(0)
        else:
            with pinned(self.quantizers.values()):
                calibrate_part(
                    self.model,
                    Part(self.name, [len(chosen) for _, chosen in batches], run),
                    self.quantizers,
                    self.folder,
                )

    def _optimize(self, done: Callable[[], object]) -> None:
        options = self.options
        self.roundings: list[tuple[QuantWeightLayer, AdaRound]] = []
        if options.rounding_learning_rate:
            for layer in self.layers.values():
                if isinstance(layer.weight_quantizer, UniformQuantizer):
                    self.roundings.append((layer, AdaRound(layer.weight, layer.weight_quantizer)))
        learned = self._learned() if options.step_learning_rate else []
        steps = [quantizer.scale for quantizer in learned]
        smallest = [_MIN_STEP * step for step in steps]
        optimizers: list[torch.optim.Optimizer] = []
        if self.roundings:
            alphas = [rounding.alpha for _, rounding in self.roundings]
            optimizers.append(torch.optim.Adam(alphas, options.rounding_learning_rate, fused=True))
        if steps:
            means = [_mean_step(quantizer) for quantizer in learned]
            rates = [min(options.step_learning_rate, _MAX_RATE * mean) for mean in means]
            groups = [{"params": [step], "lr": rate} for step, rate in zip(steps, rates, strict=True)]
            optimizers.append(torch.optim.Adam(groups, fused=True))
        if not optimizers:
            return
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], options.iterations) if steps else None

        best, best_error, worse = None, math.inf, 0
        with self._differentiable(steps):
            for iteration in range(options.iterations):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                with torch.enable_grad():
                    loss = self._loss(iteration / options.iterations)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                if decay:
                    decay.step()
                for step, limit in zip(steps, smallest, strict=True):
                    step.clamp_(min=limit)
                done()
                if options.held_back and self._is_check(iteration):
                    self._round()
                    error = self._error()
                    if error < best_error:
                        best, best_error, worse = self.state(), error, 0
                    elif (worse := worse + 1) == _PATIENCE:
                        break
        self._round()
        if best is not None:
            self.load_state(best)

    def _learned(self) -> list[Quantizer]:
        """Return the activation quantizers whose step sizes are learned."""
        products = [module for module in self.module.modules() if isinstance(module, QuantMatMul)]
        operands = [operand for product in products for operand in (product.left_quantizer, product.right_quantizer)]
        fixed = operands if self.options.released else []
        return [quantizer for quantizer in self.quantizers.values() if not any(quantizer is other for other in fixed)]

    def _draw(self) -> tuple[_Examples, Tensor]:
        """Return the images of an iteration, which have one size: examples, and indices among them."""
        which, place = self.places[self.trained_on].unbind(1)
        if len(self.examples) > 1:
            same = which == which[torch.randint(len(which), (1,))]
            which, place = which[same], place[same]
        examples = self.examples[int(which[0])]
        count, size = len(place), self.options.optimize_batch_size
        if self.options.released:
            return examples, place[torch.randint(count, (size,))]
        return examples, place[torch.randperm(count)[:size]]

    def _loss(self, progress: float) -> Tensor:
        """Return the loss of a random batch, `progress` (0 to 1) through the iterations."""
        options = self.options
        examples, chosen = self._draw()
        mixed = {}
        for key, tensor in examples.inputs.items():
            full = tensor[chosen]
            quantized = torch.rand_like(full) < options.mix_probability
            mixed[key] = torch.where(quantized, examples.quantized_inputs[key][chosen], full)
        targets = self._target_scores(examples, chosen)
        for layer, rounding in self.roundings:
            layer.learned_weight = rounding.soft().to(layer.weight.dtype)
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=options.autocast),
            self._scores() as scores,
        ):
            output = self._run(examples, mixed)
        loss = self._squared_error(output, examples.targets[chosen].flatten(0, 1).to(self.device))
        for score, target in zip(scores, targets, strict=True):
            loss = loss + options.attention_weight * self._divergence(score, target)
        if progress >= _WARM_UP:
            start, end = _BETA
            beta = start + (end - start) * (progress - _WARM_UP) / (1 - _WARM_UP)
            for _, rounding in self.roundings:
                loss = loss + options.rounding_weight * rounding.regularizer(beta)
        return loss

    def _divergence(self, scores: Tensor, target: Tensor) -> Tensor:
        """Return KL(full precision ‖ quantized) of attention scores but for a constant.

        It is summed over queries, mean over heads and rows. The released code's is KL(quantized ‖ full precision), mean
        over rows.
        """
        if self.options.released:
            logarithm = (scores.float().softmax(-1) / self.options.temperature).log_softmax(1)
            return (logarithm.exp() * (logarithm - target.log())).sum() / len(scores)
        logarithm = (scores.float() / self.options.temperature).log_softmax(-1)
        return -(target * logarithm).sum() / math.prod(scores.shape[:2])

    def _is_check(self, iteration: int) -> bool:
        passed = iteration + 1
        every = max(1, self.options.iterations // _CHECKS)
        return passed >= _WARM_UP * self.options.iterations and (
            passed % every == 0 or passed == self.options.iterations
        )

    @contextmanager
    def _differentiable(self, steps: list[Tensor]) -> Iterator[None]:
        for quantizer in self.quantizers.values():
            quantizer.straight_through = not self.options.released
        for step in steps:
            step.requires_grad_(True)
        try:
            yield
        finally:
            for step in steps:
                step.requires_grad_(False)
            for quantizer in self.quantizers.values():
                quantizer.straight_through = True

    def _round(self) -> None:
        for layer, rounding in self.roundings:
            layer.learned_weight = rounding.hard().to(layer.weight.dtype)

    def _error(self) -> float:
        """Return the reconstruction error on the judging images, with the quantized network's inputs."""
        total = 0.0
        for examples, chosen in self._batches(self.judged_on):
            output = self._forward(examples, examples.quantized_inputs, chosen)
            target = examples.targets[chosen].flatten(0, 1).to(self.device)
            total += float(self._squared_error(output, target)) * len(chosen)
        return total / len(self.judged_on)

    def state(self) -> dict[str, Tensor]:
        """Return copies of all tensors that calibration and optimization change."""
        buffers = {
            f"{name}.{key}": buffer.clone()
            for name, quantizer in self.quantizers.items()
            for key, buffer in quantizer.state_dict().items()
        }
        weights = {name: layer.learned_weight for name, layer in self.layers.items()}
        return buffers | {name: weight.clone() for name, weight in weights.items() if weight is not None}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load tensors from `state`."""
        for name, quantizer in self.quantizers.items():
            quantizer.load_state_dict({key: state[f"{name}.{key}"] for key in quantizer.state_dict()})
        for name, layer in self.layers.items():
            learned = state.get(name)
            layer.learned_weight = None if learned is None else learned.to(layer.weight.device)


def _mean_step(quantizer: Quantizer) -> float:
    """Return the mean step size of the groups with a range, or of all without any."""
    ranged = quantizer.has_range
    steps = quantizer.scale if ranged.all() or not ranged.any() else quantizer.scale[ranged]
    return steps.mean().item()


def _by_key(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Iterator[tuple[int | str, Any]]:
    yield from enumerate(arguments)
    yield from keywords.items()


def _replace(
    arguments: tuple[Any, ...], keywords: Mapping[str, Any], values: Mapping[int | str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace some arguments of a call."""
    changed = {**dict(_by_key(arguments, keywords)), **values}
    return tuple(changed[index] for index in range(len(arguments))), {key: changed[key] for key in keywords}
