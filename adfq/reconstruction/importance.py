"""The importance of each row of a layer's output for the network's output, in full precision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adfq.calibration import CalibrationImages, progress_bar
from adfq.calibration.grams import has_gram
from adfq.calibration.walk import replaced_forward
from adfq.layers import QuantConv2d, QuantWeightLayer
from adfq.reconstruction.fisher import output_spread, output_tensors
from adfq.sites import Network

_DIRECTIONS = 2  # random directions of the network's output


def importance_of_rows(network: Network, images: CalibrationImages) -> dict[str, list[Tensor]]:
    """Return the importance of the rows of each layer's output: the norm of their gradient.

    A row is the output for a token, or for a position of a convolution. The gradient is that of the network's output
    along two random directions, whose root mean square is taken. Several outputs, such as a detector's, count each
    in units of its standard deviation. Memory holds a batch, and what one module of the trunk keeps for its gradient.
    The result takes four bytes a row.

    Args:
        network: network with quantizers or without.
        images: calibration images.

    Returns:
        Importance by name of the layer, in the order in which the layer is used in the batches. It is float32, and has
        the shape of the layer's output without its channels. A layer without an effect on the output is left out, and
        so is one whose gradients are not finite, or whose inputs have no Gram matrix
        (`adfq.calibration.grams.has_gram`). A warning says if none is left.
    """
    signs = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        stack.enter_context(network.full_precision())
        stack.enter_context(_frozen(network.model))
        progress = stack.enter_context(progress_bar("weighing rows", len(images.sizes)))
        # One image, so that batches do not matter.
        spreads = [output_spread(output) for output in output_tensors(network.run(images[0][:1]))]
        for batch in images:
            for name, calls in _squared_gradients(network, batch, spreads, signs).items():
                found.setdefault(name, []).extend(call.sqrt() for call in calls)
            progress.update()
    counted = {name: calls for name, calls in found.items() if 0 < sum(float(call.sum()) for call in calls) < math.inf}
    if found and not counted:
        warnings.warn("no layer has a finite gradient to the model's output; all rows count the same", stacklevel=2)
    return counted


def _squared_gradients(
    network: Network, batch: Tensor, spreads: Sequence[Tensor | None], signs: torch.Generator
) -> dict[str, list[Tensor]]:
    """Return the sum of squared gradients for the rows of each use of each layer."""
    found: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        watch = stack.enter_context(_watched(network.weight_layers(), found))
        for name in network.trunk:  # computes again what its gradient needs, instead of keeping it
            module = network.model.get_submodule(name)
            stack.enter_context(replaced_forward(module, partial(checkpoint, module.forward, use_reentrant=False)))
        leaf = network.place(batch).detach().requires_grad_()
        with torch.enable_grad():
            outputs = output_tensors(network.run(leaf))
            watch.clear()  # a layer that runs again for the gradients is not used once more
            if len(outputs) != len(spreads):  # a stage of a detector without a proposal in that image
                spreads = [output_spread(output) for output in outputs]
            terms = [
                (output.float() * drawn / spread).flatten(1).sum(1)
                for output, drawn, spread in zip(outputs, _signs(outputs, len(batch), signs), spreads, strict=True)
                if output.requires_grad and spread is not None
            ]
            totals = torch.stack(terms).sum(0).unbind() if terms else ()
        for index, total in enumerate(totals):
            torch.autograd.grad(total, leaf, retain_graph=index < _DIRECTIONS - 1, allow_unused=True)
    return found


def _signs(outputs: Sequence[Tensor], images: int, generator: torch.Generator) -> list[Tensor]:
    """Return random signs for each direction of each output, drawn image after image: directions×…."""
    drawn = [torch.empty(_DIRECTIONS, *output.shape) for output in outputs]
    for image in range(images):
        for own in drawn:
            rows = own.tensor_split(images, 1)[image]
            rows.copy_(torch.randint(2, rows.shape, generator=generator) * 2 - 1)
    return [own.to(output.device) for own, output in zip(drawn, outputs, strict=True)]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Give parameters no gradients."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


@contextmanager
def _watched(layers: Iterator[tuple[str, QuantWeightLayer]], found: dict[str, list[Tensor]]) -> Iterator[list[bool]]:
    """Sum squared gradients at the outputs of layers. Uses count until the list that is given is empty."""
    watch = [True]

    def take(name: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        if watch:
            channels = 1 if isinstance(layer, QuantConv2d) else -1
            squares = torch.zeros_like(output.detach().select(channels, 0), dtype=torch.float32)
            found.setdefault(name, []).append(squares)
            if output.requires_grad:
                output.register_hook(partial(_add, squares, channels))

    hooks = [layer.register_forward_hook(partial(take, name)) for name, layer in layers if has_gram(layer)]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _add(squares: Tensor, channels: int, gradient: Tensor) -> None:
    squares += gradient.detach().float().square().sum(channels)
