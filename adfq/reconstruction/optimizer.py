"""The optimization of a network's units, one after another in the order of the forward pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from adfq.calibration import progress_bar
from adfq.calibration.finished import Finished
from adfq.calibration.walk import Part, Walk, with_checked_trunk
from adfq.method import Run
from adfq.reconstruction.examples import collect
from adfq.reconstruction.losses import Loss
from adfq.reconstruction.options import OptimizerOptions, RoundingOptions
from adfq.reconstruction.trained import Roundings, Steps, Trained
from adfq.reconstruction.unit import Batch, Unit, blocks_of
from adfq.sites import Network, is_within, sites_of

_SETTLING = 0.2  # share of the iterations before states are compared
_CHECKS = 20  # greatest number of evaluations on the held-back images
_PATIENCE = 4  # number of checks in a row without improvement that ends the optimization


@dataclass(frozen=True)
class Result:
    """Outcome of a unit's optimization.

    The error is that of the reconstruction (`Loss.error` of the first loss) with the quantized network's inputs, on the
    held-back images, or on all without any.

    Attributes:
        before: error of the calibrated unit.
        after: error of the optimized unit.
        kept: True if the unit has the optimized state; False if that was no better.
    """

    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class Composition:
    """The parts that a method's reconstruction is composed of.

    Attributes:
        losses: function from a unit to the terms of its loss.
        trained: function from a calibrated unit to what is trained in it; those that are False are left out.
        units: function from a network to the names of its units, in the order of the forward pass; `blocks_of` by
            default.
        mix_probability: probability that an element of a unit's input is the quantized network's.
        drop_probability: see `adfq.reconstruction.RoundingOptions`.
        keeps_all: True keeps the optimized state whatever its error.
        straight_through: False lets no gradient through activation quantizers.
        replacement: True draws batches with replacement.
        stage: prefix of the names of finished units' files, where a method has several reconstructions; empty by
            default.
    """

    losses: Callable[[Unit], Sequence[Loss]]
    trained: Callable[[Unit], Sequence[Trained]]
    units: Callable[[Network], Sequence[str]] = blocks_of
    mix_probability: float = 0.5
    drop_probability: float = 0.0
    keeps_all: bool = False
    straight_through: bool = True
    replacement: bool = False
    stage: str = ""


def roundings_and_steps(options: RoundingOptions, products: bool = True) -> Callable[[Unit], Sequence[Trained]]:
    """Return the function of a `Composition` that trains roundings and step sizes.

    Args:
        options: learning rates; one of 0 leaves its part out.
        products: see `Steps`.
    """

    def trained(unit: Unit) -> Sequence[Trained]:
        found: list[Trained] = []
        if options.rounding_learning_rate:
            found.append(Roundings(unit, options.rounding_learning_rate, options.rounding_weight))
        if options.step_learning_rate:
            found.append(Steps(unit, options.step_learning_rate, options.iterations, products))
        return found

    return trained


def optimize_units(
    network: Network,
    run: Run,
    options: OptimizerOptions,
    composition: Composition,
    teacher: Network | None = None,
) -> dict[str, Result]:
    """Calibrate and optimize unit after unit of a network.

    Full precision and the quantized network walk side by side: every unit finds its inputs in both, is calibrated as
    far as it is not yet, and optimized. Memory holds these inputs and the targets of one unit for all images, and a
    batch of everything else. A run with a folder to resume from leaves finished units there, and does not optimize
    them again.

    Args:
        network: network with quantizers attached; its parameters get no gradients any more.
        run: calibration images, and the folder to resume from.
        options: options of the optimization.
        composition: parts of the reconstruction.
        teacher: network of the same modules that gives targets in full precision; None, the default, for this one.

    Returns:
        Outcome of each unit by name, in the order of the forward pass.

    Raises:
        NonFiniteError: for activations that hold NaN or infinity; the message names the site.
        AdfqError: for a folder that cannot be written.
    """
    teacher = teacher or network
    network.model.requires_grad_(False)
    teacher.model.requires_grad_(False)
    names = composition.units(network)
    # A seed for each module, so that what one draws does not depend on those before it.
    seeds = torch.randint(2**62, (len(names),)).tolist()
    finished = Finished(run.images.folder, network, run.images, f"{options} {seeds}")
    # Both versions of the network walk in batches of the optimization's size.
    images = run.images.split(options.optimize_batch_size)
    checked = with_checked_trunk(network, images)
    exact = checked if teacher is network else with_checked_trunk(teacher, images)
    walks = Walk(exact, images, full_precision=True), Walk(checked, images)
    results: dict[str, Result] = {}

    def optimize(name: str, seed: int, parts: Sequence[Part]) -> None:
        progress.set_description(f"optimizing {name}")
        torch.manual_seed(seed)
        source = teacher.model.get_submodule(name)
        units = source, network.model.get_submodule(name)
        examples, places = collect(units, walks, parts, run.images.folder)
        rest, feature = walks[0].rest(source), walks[0].feature(source)
        sizes = run.images.sizes, options.optimize_batch_size
        unit = Unit(network, name, examples, places, *sizes, run.images.folder, rest, images.sizes, feature)
        unit.set_targets(source, list(sites_of(teacher.model, name)))
        known = finished.restore(composition.stage + name)
        if known is None:
            results[name] = Reconstruction(unit, options, composition).run(progress.update)
            finished.keep(composition.stage + name, unit.state(), asdict(results[name]))
        else:
            unit.load_state(known[0])
            results[name] = Result(**known[1])
        progress.set_postfix_str(f"error {results[name].before:.3g} → {results[name].after:.3g}")

    steps = len(names) * options.iterations
    # The caller draws the same numbers afterwards, whether units were optimized or restored.
    with progress_bar("optimizing modules", steps) as progress, torch.no_grad(), torch.random.fork_rng():
        for parts in zip(*(walk.parts() for walk in walks), strict=True):
            for name, seed in zip(names, seeds, strict=True):
                if name not in results and is_within(name, parts[0].name):
                    optimize(name, seed, parts)
    worse = [name for name, result in results.items() if not result.kept]
    if worse:
        warnings.warn(
            f"optimization made these modules no better, they stay as calibrated: {', '.join(worse)}", stacklevel=2
        )
    return results


class Reconstruction:
    """The optimization of one unit.

    Args:
        unit: the unit.
        options: options of the optimization.
        composition: parts of the reconstruction.
    """

    def __init__(self, unit: Unit, options: OptimizerOptions, composition: Composition) -> None:
        self.unit, self.options, self.composition = unit, options, composition
        self.trained: list[Trained] = []
        self.losses = composition.losses(unit)
        images = len(unit.places)
        held_back = round(options.held_back * images)
        self.trained_on, self.judged_on = torch.arange(images).tensor_split([images - held_back])
        if not held_back:
            self.judged_on = self.trained_on

    def run(self, done: Callable[[], object]) -> Result:
        """Calibrate and optimize the unit.

        Args:
            done: called after each iteration.
        """
        self.unit.calibrate()
        self.prepare()
        calibrated, before = self.unit.state(), self.error()
        self.optimize(done)
        after = self.error()
        kept = self.composition.keeps_all or after < before
        if not kept:
            self.unit.load_state(calibrated)
        return Result(before, after, kept)

    def prepare(self) -> None:
        """Set what is trained in the calibrated unit."""
        self.trained = [part for part in self.composition.trained(self.unit) if part]

    def optimize(self, done: Callable[[], object]) -> None:
        """Optimize the prepared unit.

        Args:
            done: called after each iteration.
        """
        with self._differentiable():
            best = self._iterate(done) if self.trained else None
            self.settle()
            for part in self.trained:
                part.finish()
        if best is not None:
            self.unit.load_state(best)

    def _iterate(self, done: Callable[[], object]) -> dict[str, Tensor] | None:
        """Run the iterations, and return the best state on held-back images; None without these."""
        iterations = self.options.iterations
        best, best_error, worse = None, math.inf, 0
        for iteration in range(iterations):
            for part in self.trained:
                part.optimizer.zero_grad()
            with torch.enable_grad():
                total = self.loss(iteration / iterations)
            total.backward()
            for part in self.trained:
                part.optimizer.step()
                part.after()
            done()
            if self.options.held_back and self._is_check(iteration):
                self.settle()
                error = self.error()
                if error < best_error:
                    best, best_error, worse = self.unit.state(), error, 0
                elif (worse := worse + 1) == _PATIENCE:
                    break
        return best

    def draw(self) -> Batch:
        """Return the images of an iteration, which have one size."""
        which, place = self.unit.places[self.trained_on].unbind(1)
        if len(self.unit.examples) > 1:
            same = which == which[torch.randint(len(which), (1,))]
            which, place = which[same], place[same]
        examples = self.unit.examples[int(which[0])]
        count, size = len(place), self.options.optimize_batch_size
        if self.composition.replacement:
            return Batch(examples, place[torch.randint(count, (size,))])
        return Batch(examples, place[torch.randperm(count)[:size]])

    def loss(self, progress: float) -> Tensor:
        """Return the loss of a random batch.

        Args:
            progress: share of the iterations that are done, 0 to 1.
        """
        unit, batch = self.unit, self.draw()
        rows = self._mixed(batch)
        for part in self.trained:
            part.before()
        with unit.dropped_quantization(self.composition.drop_probability), ExitStack() as watching:
            for loss in self.losses:
                loss.update(progress)
                watching.enter_context(loss.watching(batch))
            with torch.autocast(unit.device.type, torch.bfloat16, enabled=self.options.autocast):
                output = unit.run(batch.examples, rows)
        total = self.losses[0](output, batch)
        for loss in self.losses[1:]:
            total = total + loss(output, batch)
        for part in self.trained:
            penalty = part.penalty(progress)
            total = total if penalty is None else total + penalty
        return total

    def _mixed(self, batch: Batch) -> dict[int | str, Tensor]:
        """Return inputs, element by element the quantized network's or full precision's (QDrop, Wei et al., 2022)."""
        examples, chosen = batch
        probability = self.composition.mix_probability
        mixed = {}
        for key, tensor in examples.inputs.items():
            full = tensor[chosen]
            quantized = torch.rand_like(full) < probability
            mixed[key] = torch.where(quantized, examples.quantized_inputs[key][chosen], full)
        return {key: tensor.flatten(0, 1).to(self.unit.device) for key, tensor in mixed.items()}

    def _is_check(self, iteration: int) -> bool:
        passed = iteration + 1
        every = max(1, self.options.iterations // _CHECKS)
        return passed >= _SETTLING * self.options.iterations and (
            passed % every == 0 or passed == self.options.iterations
        )

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        quantizers = self.unit.quantizers.values()
        for quantizer in quantizers:
            quantizer.straight_through = self.composition.straight_through
        try:
            yield
        finally:
            for quantizer in quantizers:
                quantizer.straight_through = True

    def settle(self) -> None:
        """Put the present state into the unit as it is without the optimization."""
        for part in self.trained:
            part.settle()

    @torch.no_grad()
    def error(self) -> float:
        """Return the reconstruction error on the judging images, with the quantized network's inputs."""
        total = 0.0
        for batch in self.unit.batches(self.judged_on):
            output = self.unit.forward(batch, batch.examples.quantized_inputs)
            total += float(self.losses[0].error(output, batch)) * len(batch.chosen)
        return total / len(self.judged_on)
