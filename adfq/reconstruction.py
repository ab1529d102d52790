"""Unit-wise optimization after calibration: ADFQ-ViT's attention-score enhanced module-wise optimization (AMO).

Unit after unit in the order of the forward pass, weights learn to round up or down and activation quantizers learn
their step size, so that the unit's output is that of full precision. Sources: ADFQ-ViT, section "attention-score
enhanced module-wise optimization"; AdaRound, Nagel et al., 2020; learned step size, Esser et al., 2020; mixed inputs,
QDrop, Wei et al., 2022.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adfq.calibration import calibrating, progress_bar
from adfq.errors import AdfqError
from adfq.layers import QuantConv2d, QuantMatMul, QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import Quantizer, UniformQuantizer
from adfq.quantizers.adaround import AdaRound
from adfq.sites import Network

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

    One forward pass serves full precision and the quantized network side by side: every unit finds its inputs in both,
    is calibrated and optimized, and hands on its outputs in both. A run with a folder to resume from leaves finished
    units there, and does not optimize them again.

    Args:
        network: network with quantizers attached and weights quantized; its parameters get no gradients any more.
        run: images, B×C×H×W, and the folder to resume from.
        options: options of the optimization.

    Returns:
        Outcome of each unit by name, in the order of the forward pass.

    Raises:
        NonFiniteError: for activations that hold NaN or infinity; the message names the site.
        AdfqError: for a folder that cannot be written.
    """
    images = network.place(run.images)
    network.model.requires_grad_(False)
    # A seed for each module, so that what one draws does not depend on those before it.
    seeds = torch.randint(2**62, (len(network.units),)).tolist()
    finished = _Finished(run.resume, network, images, f"{options} {seeds}")
    results: dict[str, Result] = {}
    outputs: list[Tensor] = []
    hooks = []

    with progress_bar("optimizing modules", len(network.units) * options.iterations) as progress:

        def optimize(name: str, seed: int, module: nn.Module, arguments: tuple[Any, ...], keywords: Any) -> Any:
            progress.set_description(f"optimizing {name}")
            torch.manual_seed(seed)
            reconstruction = _Reconstruction(network, name, len(images), options, arguments, keywords)
            result = finished.restore(name, reconstruction)
            if result is None:
                result = reconstruction.run(progress.update)
                finished.keep(name, reconstruction, result)
            results[name] = result
            progress.set_postfix_str(f"error {result.before:.3g} → {result.after:.3g}")
            outputs.append(torch.cat([reconstruction.targets, reconstruction.quantized_outputs()]).flatten(0, 1))
            # The module itself runs on one image only, for its output is known.
            first = {key: tensor[0] for key, tensor in reconstruction.inputs.items()}
            return _replace(arguments, keywords, first)

        for name, seed in zip(network.units, seeds, strict=True):
            module = network.model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(partial(optimize, name, seed), with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda *_: outputs.pop()))
        try:
            with torch.no_grad():
                network.run_units(torch.cat([images, images]))
        finally:
            for hook in hooks:
                hook.remove()
    worse = [name for name, result in results.items() if not result.kept]
    if worse:
        warnings.warn(
            f"optimization made these modules no better, they stay as calibrated: {', '.join(worse)}", stacklevel=2
        )
    return results


class _Finished:
    """Units that an earlier run of the same network, images and options has optimized."""

    def __init__(self, folder: Path | None, network: Network, images: Tensor, options: str) -> None:
        self.folder = folder
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdfqError(f"cannot write to {self.folder}: {error.strerror}") from None
        digest = hashlib.sha256(f"{torch.__version__} {options} {network.model}".encode())
        for tensor in (images, *network.model.state_dict().values()):
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.fingerprint = digest.hexdigest()

    def restore(self, name: str, reconstruction: _Reconstruction) -> Result | None:
        """Load the state of a finished unit, and return its outcome; None for an unfinished one."""
        if self.folder is None:
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
                found = json.loads(file.metadata()["adfq"])
                if found.pop("fingerprint") != self.fingerprint:
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # none, or a damaged one
            return None
        reconstruction.load_state(tensors)
        return Result(**found)

    def keep(self, name: str, reconstruction: _Reconstruction, result: Result) -> None:
        """Save a unit's state and outcome."""
        if self.folder is None:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.folder / f"{name}.safetensors"
        header = json.dumps({"fingerprint": self.fingerprint, **asdict(result)})
        try:
            save_file(reconstruction.state(), path.with_suffix(".part"), {"adfq": header})
            os.replace(path.with_suffix(".part"), path)
        except (OSError, SafetensorError) as error:
            raise AdfqError(f"cannot write {path}: {error}") from None


class _Reconstruction:
    """Unit with all data of its optimization.

    Inputs, targets and scores are B×k×…, with k rows of the unit's input for each image (Swin's windows). Inputs are
    all tensor arguments with as many rows as the first, by position or keyword: cross-attention has three. Keywords in
    the unit's `shared_arguments` are not among them.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        images: int,
        options: OptimizerOptions,
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
    ) -> None:
        self.options = options
        self.module = network.model.get_submodule(name)
        self.arguments = arguments, keywords
        modules = self.module.named_modules()
        self.layers = {key: layer for key, layer in modules if isinstance(layer, QuantWeightLayer)}
        self.quantizers = network.activation_quantizers(name)
        self.softmaxes = [module for module in self.module.modules() if isinstance(module, nn.Softmax)]
        self.channels_first = any(isinstance(layer, QuantConv2d) for layer in self.layers.values())
        self.inputs, self.quantized_inputs = {}, {}
        # Rotary positions, say, may have as many rows by chance.
        shared = getattr(self.module, "shared_arguments", ())
        tensors = {
            key: value for key, value in _by_key(arguments, keywords) if isinstance(value, Tensor) and key not in shared
        }
        rows = len(next(iter(tensors.values())))
        for key, tensor in tensors.items():
            if tensor.dim() and len(tensor) == rows:
                halves = tensor.unflatten(0, (2 * images, -1)).chunk(2)
                self.inputs[key], self.quantized_inputs[key] = halves
        with network.full_precision():
            self.targets, self.scores = self._targets()
        held_back = round(options.held_back * images)
        self.trained_on, self.judged_on = torch.arange(images).tensor_split([images - held_back])
        if not held_back:
            self.judged_on = self.trained_on

    def _targets(self) -> tuple[Tensor, list[Tensor]]:
        outputs, scores = [], []
        for chosen in self._batches():
            with self._scores() as found:
                outputs.append(self._forward(_choose(self.inputs, chosen)).unflatten(0, (len(chosen), -1)))
            scores.append([self._distribution(score).unflatten(0, (len(chosen), -1)) for score in found])
        return torch.cat(outputs), [torch.cat(parts) for parts in zip(*scores, strict=True)]

    def quantized_outputs(self) -> Tensor:
        """Return the unit's outputs in the quantized network, B×k×…."""
        outputs = [
            self._forward(_choose(self.quantized_inputs, chosen)).unflatten(0, (len(chosen), -1))
            for chosen in self._batches()
        ]
        return torch.cat(outputs)

    def _batches(self) -> tuple[Tensor, ...]:
        images = len(next(iter(self.inputs.values())))
        batches: tuple[Tensor, ...] = torch.arange(images).split(self.options.optimize_batch_size)
        return batches

    def _forward(self, inputs: Mapping[int | str, Tensor]) -> Tensor:
        arguments, keywords = _replace(*self.arguments, {key: tensor.flatten(0, 1) for key, tensor in inputs.items()})
        output: Tensor = self.module.forward(*arguments, **keywords)
        return output

    def _squared_error(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the squared error, summed over tokens (channels of a convolution), mean over the rest."""
        error = (output.float() - target.float()).square()
        if error.dim() > 3 and not self.channels_first:
            error = error.flatten(1, -2)
        return error.sum(1).mean()

    @contextmanager
    def _scores(self) -> Iterator[list[Tensor]]:
        """Collect the input of every softmax of the unit inside the block."""
        found: list[Tensor] = []
        wanted = self.softmaxes if self.options.attention_weight else []
        hooks = [softmax.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for softmax in wanted]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _distribution(self, scores: Tensor) -> Tensor:
        if self.options.released:
            return (scores.float().softmax(-1) / self.options.temperature).softmax(1)
        return (scores.float() / self.options.temperature).softmax(-1)

    def run(self, done: Callable[[], object]) -> Result:
        """Calibrate and optimize the unit."""
        with calibrating(self.quantizers.items()):
            self._forward(self.quantized_inputs)
        calibrated, before = self.state(), self._error()
        self._optimize(done)
        after = self._error()
        kept = self.options.released or after < before
        if not kept:
            self.load_state(calibrated)
        return Result(before, after, kept)

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

    def _draw(self) -> Tensor:
        """Return the images of an iteration, by their indices."""
        count, size = len(self.trained_on), self.options.optimize_batch_size
        if self.options.released:
            return self.trained_on[torch.randint(count, (size,))]
        return self.trained_on[torch.randperm(count)[:size]]

    def _loss(self, progress: float) -> Tensor:
        """Return the loss of a random batch, `progress` (0 to 1) through the iterations."""
        options = self.options
        chosen = self._draw()
        mixed = {}
        for key, tensor in _choose(self.inputs, chosen).items():
            quantized = torch.rand_like(tensor) < options.mix_probability
            mixed[key] = torch.where(quantized, self.quantized_inputs[key][chosen], tensor)
        for layer, rounding in self.roundings:
            layer.learned_weight = rounding.soft().to(layer.weight.dtype)
        with (
            torch.autocast(self.targets.device.type, torch.bfloat16, enabled=options.autocast),
            self._scores() as scores,
        ):
            output = self._forward(mixed)
        loss = self._squared_error(output, self.targets[chosen].flatten(0, 1))
        for score, target in zip(scores, self.scores, strict=True):
            loss = loss + options.attention_weight * self._divergence(score, target[chosen].flatten(0, 1))
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
        for chosen in self.judged_on.split(self.options.optimize_batch_size):
            output = self._forward(_choose(self.quantized_inputs, chosen))
            total += float(self._squared_error(output, self.targets[chosen].flatten(0, 1))) * len(chosen)
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


def _choose(inputs: Mapping[int | str, Tensor], chosen: Tensor) -> dict[int | str, Tensor]:
    return {key: tensor[chosen] for key, tensor in inputs.items()}
