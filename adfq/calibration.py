"""Calibration of a network's weight and activation quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adfq.errors import AdfqError
from adfq.quantizers import Quantizer
from adfq.sites import Network

if TYPE_CHECKING:
    from tqdm import tqdm


def gather_batches(calibration: Iterable[Any] | Tensor | None) -> Tensor:
    """Return calibration batches as one tensor; ranges are found over all images at once.

    Args:
        calibration: tensor B×C×H×W, or iterable of such tensors or of tuples that begin with one, as a DataLoader of
            images and labels gives.

    Returns:
        Images, B×C×H×W.

    Raises:
        AdfqError: if there are no images, if batches differ in size, or if something else than tensors comes.
    """
    if calibration is None:
        raise AdfqError("calibration images are needed: pass calibration=<tensor or iterable of batches>")
    if not isinstance(calibration, Iterable):
        raise AdfqError(f"calibration must be a tensor or an iterable of batches, got {type(calibration).__name__}")
    batches: list[Any] = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    images: list[Any] = [batch[0] if isinstance(batch, (tuple, list)) and batch else batch for batch in batches]
    for image in images:
        if not isinstance(image, Tensor) or image.dim() != 4:
            found = f"of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise AdfqError(f"calibration batches must be tensors B×C×H×W, got one {found}")
    if not sum(len(image) for image in images):
        raise AdfqError("there are no calibration images")
    if len({image.shape[1:] for image in images}) > 1:
        raise AdfqError("calibration batches must hold images of one size")
    return torch.cat(images)


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
            _naming(f"{name}.weight", layer.find_weight_range)
            progress.update()


def calibrate_activations(network: Network, images: Tensor) -> None:
    """Calibrate every activation quantizer that is not yet calibrated, in one forward pass.

    A quantizer sees its site's input as the already quantized layers before it compute it, as in the methods' released
    code.

    Args:
        network: network with quantizers attached.
        images: B×C×H×W; moved to the model's device and dtype.

    Raises:
        AdfqError: for a site that the model does not use; the message names it.
        NonFiniteError: for activations that hold NaN or infinity; the message names the site.
    """
    sites = [(name, found) for name, found in network.activation_quantizers().items() if not found.is_calibrated]
    if not sites:
        return
    progress = progress_bar("calibrating activations", len(sites))
    with progress, calibrating(sites, progress.update), torch.no_grad():
        network.run(images)
    for name, quantizer in sites:
        if not quantizer.is_calibrated:
            raise AdfqError(f"{name} saw no calibration data: the model does not use this layer")


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
        _naming(name, partial(quantizer.calibrate, inputs[0]))
        done()


def progress_bar(what: str, steps: int) -> tqdm[Any]:
    """Return a progress bar that shows after two seconds, on terminals only.

    Args:
        what: label of the bar.
        steps: number of steps in all.
    """
    from tqdm import tqdm  # the core needs only torch to be imported

    return tqdm(total=steps, desc=what, delay=2, leave=False, disable=None)


def _naming(name: str, action: Callable[[], object]) -> None:
    try:
        action()
    except AdfqError as error:
        raise type(error)(f"{name}: {error}") from None
