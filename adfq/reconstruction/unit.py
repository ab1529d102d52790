"""A unit of a network with all data of its reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adfq.calibration import calibrating
from adfq.calibration.passes import calibrate_part, pinned
from adfq.calibration.waiting import Rows, room_for
from adfq.calibration.walk import Part
from adfq.layers import QuantConv2d, QuantWeightLayer
from adfq.reconstruction.examples import Examples
from adfq.sites import Network, full_precision, is_within, sites_of


def blocks_of(network: Network) -> tuple[str, ...]:
    """Return the names of a network's units with transformer blocks as wholes.

    A module of the trunk with several units takes their place.

    Args:
        network: an adapted model.
    """
    found = (next((name for name in network.blocks if is_within(unit, name)), unit) for unit in network.units)
    return tuple(dict.fromkeys(found))


class Batch(NamedTuple):
    """Some images of one size.

    Attributes:
        examples: examples of that size.
        chosen: indices among these.
    """

    examples: Examples
    chosen: Tensor


def size_index(unit: Unit, batch: Batch) -> int:
    """Return the index of a batch's examples among those of its unit.

    Args:
        unit: the unit.
        batch: some of its images.
    """
    return next(index for index, examples in enumerate(unit.examples) if examples is batch.examples)


class Unit:
    """Part of a network that is reconstructed by itself, with inputs and targets of all images on the host.

    Args:
        network: network with the unit.
        name: name of the unit.
        examples: its inputs for each size of images.
        places: index of each image's examples, and its index among them; N×2.
        sizes: number of images in each batch of calibration.
        batch_size: number of images that go through the unit at once.
        folder: folder for what waits; None, the default, for the system's temporary one.
        rest: function from the index of a batch of `rest_sizes` and the unit's output to the output of the network in
            full precision; None, the default, for none.
        rest_sizes: number of images in each of these batches.
        feature: function from the index of such a batch, a number of images and the unit's output for these to the
            feature before the classifier in full precision (`adfq.calibration.walk.Walk.feature`); None, the default,
            for none.

    Attributes:
        layers: its layers with a weight, by name within the unit.
        quantizers: its activation quantizers by the name of their site.
        sites: its sites.
        channels_first: True for an output B×C×H×W.
        trained: parameters that the optimization changes, by name within the unit; filled by what trains them.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        examples: list[Examples],
        places: Tensor,
        sizes: Sequence[int],
        batch_size: int,
        folder: Path | None = None,
        rest: Callable[[int, Tensor], Any] | None = None,
        rest_sizes: Sequence[int] = (),
        feature: Callable[[int, int, Tensor], Tensor | None] | None = None,
    ) -> None:
        self.network, self.name, self.module = network, name, network.model.get_submodule(name)
        self.examples, self.places, self.sizes, self.batch_size = examples, places, sizes, batch_size
        self.folder, self.rest, self.rest_sizes = folder, rest, rest_sizes
        self._feature = feature
        self.device = next(network.model.parameters()).device
        modules = self.module.named_modules()
        self.layers = {key: layer for key, layer in modules if isinstance(layer, QuantWeightLayer)}
        self.sites = list(sites_of(network.model, name))
        self.quantizers = network.activation_quantizers(name)
        for quantizer in self.quantizers.values():  # a model's own inference mode made tensors that cannot be trained
            quantizer._apply(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
        self.channels_first = any(isinstance(layer, QuantConv2d) for layer in self.layers.values())
        self.trained: dict[str, nn.Parameter] = {}

    @property
    def is_head(self) -> bool:
        """True for a classifier's last layer, whose targets are logits, one row an image."""
        head = isinstance(self.module, QuantWeightLayer) and self.module.role == "head"
        return head and all(examples.targets.shape[1:-1] == (1,) for examples in self.examples)

    def set_targets(self, teacher: nn.Module, sites: Sequence[Any]) -> None:
        """Compute the targets.

        Args:
            teacher: the unit whose outputs in full precision are the targets; this one itself, or a copy's.
            sites: its sites.
        """
        with full_precision(sites):
            for examples, chosen in self.batches(torch.arange(len(self.places))):
                arguments, keywords = examples.arguments(self.rows(examples.inputs, chosen))
                output = teacher.forward(*arguments, **keywords).unflatten(0, (len(chosen), -1))
                if not len(examples.targets):
                    examples.targets = room_for(output, examples.count, self.folder)
                examples.targets[chosen] = output.cpu()

    def batches(self, images: Tensor) -> Iterator[Batch]:
        """Yield images in batches of the unit's batch size.

        Args:
            images: indices of images.
        """
        for examples, chosen in self.by_examples(images):
            for part in chosen.split(self.batch_size):
                yield Batch(examples, part)

    def by_examples(self, images: Tensor) -> Iterator[Batch]:
        """Yield images by their size.

        Args:
            images: indices of images.
        """
        which, place = self.places[images].unbind(1)
        for index, examples in enumerate(self.examples):
            if len(chosen := place[which == index]):
                yield Batch(examples, chosen)

    def rest_batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield the batches that the rest of the network takes, with their indices."""
        for index, images in enumerate(torch.arange(len(self.places)).split(list(self.rest_sizes))):
            (batch,) = self.by_examples(images)  # a batch has images of one size
            yield index, batch

    def feature(self, batch: Batch, output: Tensor) -> Tensor | None:
        """Return the feature before the classifier that the rest of the network, in full precision, makes of an output.

        Args:
            batch: the images.
            output: the unit's output for these.

        Returns:
            B×…; None if there is no such feature, or the unit's output is not all that it depends on.
        """
        if self._feature is None:
            return None
        index = next(index for index, other in self.rest_batches() if other.examples is batch.examples)
        return self._feature(index, len(batch.chosen), output)

    def rows(self, inputs: Mapping[int | str, Rows], chosen: Tensor) -> dict[int | str, Tensor]:
        """Return rows of inputs on the unit's device.

        Args:
            inputs: inputs of examples.
            chosen: indices of images among these.
        """
        return {key: tensor[chosen].flatten(0, 1).to(self.device) for key, tensor in inputs.items()}

    def forward(self, batch: Batch, inputs: Mapping[int | str, Rows]) -> Tensor:
        """Return the unit's output for images.

        Args:
            batch: the images.
            inputs: inputs of all images of the batch's examples.
        """
        return self.run(batch.examples, self.rows(inputs, batch.chosen))

    def run(self, examples: Examples, rows: Mapping[int | str, Tensor]) -> Tensor:
        """Return the unit's output for rows of its inputs.

        Args:
            examples: examples that the rows are of.
            rows: rows of each input.
        """
        arguments, keywords = examples.arguments(rows)
        output: Tensor = self.module.forward(*arguments, **keywords)
        return output

    def targets(self, batch: Batch) -> Tensor:
        """Return the targets of images, in the shape of the unit's output.

        Args:
            batch: the images.
        """
        return batch.examples.targets[batch.chosen].flatten(0, 1).to(self.device)

    def calibrate(self) -> None:
        """Calibrate the activation quantizers that are not yet calibrated, on the quantized network's inputs."""
        quantizers = {name: found for name, found in self.quantizers.items() if not found.is_calibrated}
        if not quantizers:
            return
        batches = [
            batch
            for images in torch.arange(len(self.places)).split(list(self.sizes))
            for batch in self.by_examples(images)
        ]

        def run(index: int) -> Tensor:
            return self.forward(batches[index], batches[index].examples.quantized_inputs)

        if len(batches) == 1:
            with calibrating(quantizers.items()):
                run(0)
        else:
            part = Part(self.name, [len(chosen) for _, chosen in batches], run)
            with pinned(quantizers.values()):
                calibrate_part(self.network.model, part, quantizers, self.folder)

    @contextmanager
    def dropped_quantization(self, probability: float) -> Iterator[None]:
        """Leave elements of activations in full precision at random inside the block (QDrop, Wei et al., 2022).

        Args:
            probability: the probability of an element.
        """

        def drop(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where(torch.rand_like(output) < probability, inputs[0], output)

        with ExitStack() as hooks:
            for quantizer in self.quantizers.values() if probability else ():
                hooks.callback(quantizer.register_forward_hook(drop).remove)
            yield

    def state(self) -> dict[str, Tensor]:
        """Return copies of all tensors that calibration and optimization change."""
        buffers = {
            f"{name}.{key}": buffer.clone()
            for name, quantizer in self.quantizers.items()
            for key, buffer in quantizer.state_dict().items()
        }
        weights = {name: layer.learned_weight for name, layer in self.layers.items()}
        learned = {name: weight.clone() for name, weight in weights.items() if weight is not None}
        return buffers | learned | {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load tensors from `state`."""
        for name, quantizer in self.quantizers.items():
            quantizer.load_state_dict({key: state[f"{name}.{key}"] for key in quantizer.state_dict()})
        for name, layer in self.layers.items():
            learned = state.get(name)
            layer.learned_weight = None if learned is None else learned.to(layer.weight.device)
        for name, parameter in self.module.named_parameters():
            if name in state and name not in self.layers:
                parameter.data.copy_(state[name])
