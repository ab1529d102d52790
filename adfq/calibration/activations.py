"""Calibration of a network's weight and activation quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adfq.calibration.finished import Finished
from adfq.calibration.images import CalibrationImages
from adfq.calibration.passes import calibrate_part, naming, pinned
from adfq.calibration.walk import Calls, Part, Walk, with_checked_trunk
from adfq.errors import AdfqError, one_line
from adfq.quantizers import Quantizer
from adfq.sites import Network, is_within

if TYPE_CHECKING:
    from tqdm import tqdm


def check_input(network: Network, images: CalibrationImages) -> None:
    """Raise AdfqError unless the model takes images of every shape, by a forward pass of one each.

    Args:
        network: network without quantizers.
        images: calibration images.
    """
    for image in images.one_of_each_shape():
        try:
            with torch.no_grad(), torch.random.fork_rng():
                network.run(image)
        except (AdfqError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model makes of its input
            shape = "×".join(map(str, image.shape[1:]))
            raise AdfqError(f"the model does not take calibration images of {shape}: {one_line(error)}") from None


def quantize_weights(network: Network) -> None:
    """Find the range of every weight, which counts as quantized from then on; full precision stays at hand.

    Args:
        network: network with quantizers attached.

    Raises:
        NonFiniteError: for weights that hold NaN or infinity; the message names the layer.
    """
    layers = list(network.weight_layers())
    with progress_bar("quantizing weights", len(layers)) as progress:
        for name, layer in layers:
            with naming(f"{name}.weight"):
                layer.find_weight_range()
            progress.update()


def calibrate_activations(network: Network, images: CalibrationImages) -> None:
    """Calibrate every activation quantizer that is not yet calibrated.

    A quantizer sees its site's input as the already quantized layers before it compute it, as in the methods' released
    code. One batch takes one forward pass. Several batches take more, so that memory holds one at a time: the modules
    of the trunk come one after the other, the units in each, and passes over the inputs of each unit. The ranges are
    the same but for the order of sums.

    Args:
        network: network with quantizers attached.
        images: calibration images; they are moved to the model's device and dtype.

    Raises:
        AdfqError: for a site that the model does not use; the message names it. For a full disk.
        NonFiniteError: for activations that hold NaN or infinity; the message names the site.
    """
    quantizers = {name: found for name, found in network.activation_quantizers().items() if not found.is_calibrated}
    if not quantizers:
        return
    with progress_bar("calibrating activations", len(quantizers)) as progress, torch.no_grad():
        if len(images.sizes) > 1:
            with pinned(quantizers.values()):
                _calibrate_in_batches(network, images, quantizers, progress.update)
        else:
            with calibrating(quantizers.items(), progress.update):
                network.run(images[0])
    for name, quantizer in quantizers.items():
        if not quantizer.is_calibrated:
            raise AdfqError(f"{name} saw no calibration data: the model does not use this layer")


def _calibrate_in_batches(
    network: Network,
    images: CalibrationImages,
    quantizers: Mapping[str, Quantizer],
    done: Callable[[], object],
) -> None:
    finished = Finished(images.folder, network, images)

    def waiting(name: str) -> dict[str, Quantizer]:
        return {
            site: quantizer
            for site, quantizer in quantizers.items()
            if is_within(site, name) and not quantizer.is_calibrated
        }

    def calibrate(part: Part) -> None:
        found = waiting(part.name)
        if found and not finished.restore_ranges(part.name, found):
            calibrate_part(network.model, part, found, images.folder, done)
            finished.keep_ranges(part.name, found)

    for part in Walk(with_checked_trunk(network, images), images).parts():
        for name in network.units:
            if name != part.name and is_within(name, part.name) and waiting(name):
                unit = network.model.get_submodule(name)
                limits = list(waiting(part.name).values())  # sites of no unit
                calls = Calls(part.calls(unit, limits), part.sizes, images.folder)
                if len(calls) == len(part.sizes):
                    calibrate(calls.part(name, unit))
        calibrate(part)


@contextmanager
def calibrating(sites: Iterable[tuple[str, Quantizer]], done: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Calibrate each named quantizer on its first input inside the block, right before that is quantized.

    A layer that is used several times, as heads are on each level of a feature pyramid, is calibrated on the first use,
    as in RepQ-ViT's code. That is the level with the most positions.

    Args:
        sites: pairs of site name, for error messages, and quantizer.
        done: called after each calibration; nothing by default.
    """
    hooks = [quantizer.register_forward_pre_hook(partial(_calibrate, name, done)) for name, quantizer in sites]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _calibrate(name: str, done: Callable[[], object], quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(quantizer, Quantizer)
    if not quantizer.is_calibrated:
        with naming(name):
            quantizer.calibrate(inputs[0])
        done()


def progress_bar(what: str, steps: int) -> tqdm[Any]:
    """Return a progress bar that shows after two seconds, on terminals only.

    Args:
        what: label of the bar.
        steps: number of steps in all.
    """
    from tqdm import tqdm  # the core needs only torch to be imported

    return tqdm(total=steps, desc=what, delay=2, leave=False, disable=None)
