"""Calibration of a network's weight and activation quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adfq.errors import AdfqError, NonFiniteError
from adfq.quantizers import Quantizer
from adfq.sites import Network

if TYPE_CHECKING:
    from tqdm import tqdm


def gather_batches(calibration: Iterable[Any] | Tensor | None, size: int | None = None, usual: int = 32) -> Tensor:
    """Return calibration batches as one tensor; ranges are found over all images at once.

    Args:
        calibration: tensor B×C×H×W, or iterable of such tensors or of tuples that begin with one, as a DataLoader of
            images and labels gives. An iterable is read until there are enough images.
        size: number of images. None, the default, takes a tensor whole, and up to `usual` images from an iterable.
        usual: a method's usual number of images.

    Returns:
        Images, B×C×H×W.

    Raises:
        AdfqError: if there are no images, fewer than `size`, or a size below 1; if batches differ in size; if something
            else than floating-point tensors comes.
        NonFiniteError: for images that hold NaN or infinity.
    """
    if calibration is None:
        raise AdfqError("calibration images are needed: pass calibration=<tensor or iterable of batches>")
    if not isinstance(calibration, Iterable):
        raise AdfqError(f"calibration must be a tensor or an iterable of batches, got {type(calibration).__name__}")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise AdfqError(f"calibration_size must be a whole number of at least 1, got {size!r}")
    batches: list[Tensor] = []
    wanted = size or (None if isinstance(calibration, Tensor) else usual or None)
    found = 0
    for batch in [calibration] if isinstance(calibration, Tensor) else calibration:
        images = _images_of(batch)
        if batches and images.shape[1:] != batches[0].shape[1:]:
            raise AdfqError("calibration batches must hold images of one size")
        batches.append(images if wanted is None else images[: wanted - found])
        found += len(batches[-1])
        if wanted is not None and found >= wanted:
            break
    if not found:
        raise AdfqError("there are no calibration images")
    if size is not None and found < size:
        raise AdfqError(f"there are only {found} calibration images for calibration_size={size}")
    return torch.cat(batches)


def _images_of(batch: Any) -> Tensor:
    """Return the images of a batch, checked."""
    images: Any = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise AdfqError(f"calibration batches must be tensors B×C×H×W, got one {found}")
    if not images.is_floating_point():
        raise AdfqError(
            f"calibration images must be preprocessed as the model's input, in floating point, got {images.dtype}"
        )
    if not torch.isfinite(images).all():
        raise NonFiniteError("calibration images are not finite (NaN or infinity)")
    return images.detach()


def check_input(network: Network, images: Tensor) -> None:
    """Raise AdfqError unless the model takes images of that shape, by a forward pass of one.

    Args:
        network: network without quantizers.
        images: B×C×H×W.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng():
            network.run(images[:1])
    except (AdfqError, torch.OutOfMemoryError):
        raise
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        shape = "×".join(map(str, images.shape[1:]))
        raise AdfqError(f"the model does not take calibration images of {shape}: {reason}") from None


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
