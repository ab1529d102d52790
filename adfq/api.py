"""`quantize`: a model after training in, its quantized copy out."""

from __future__ import annotations

import copy
import operator
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adfq.adapters import Architecture, adapt, describe
from adfq.calibration import check_input, read_images
from adfq.errors import AdfqError, NotApplicableError, one_line
from adfq.files import as_path
from adfq.method import Bits, FullPrecision, Method, Run
from adfq.registry import create_method, method_name
from adfq.sites import Network


@dataclass(frozen=True)
class Quantization:
    """The settings that a model was quantized with; `quantize` leaves it at the model as attribute `quantization`.

    Attributes:
        method: name of the method.
        bits: bit-widths of weights and activations.
        options: every option of the method, defaults included.
        seed: seed of the method's random numbers.
        calibration_size: number of calibration images.
        architecture: the model's architecture before it was quantized.
        notes: entries that `adfq.save` was asked to keep with the model, in JSON's types.
        report: findings of the method, such as the errors of reconstructed units; `adfq.save` leaves it out.
    """

    method: str
    bits: Bits
    options: Mapping[str, Any]
    seed: int
    calibration_size: int
    architecture: Architecture
    notes: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


def quantize(
    model: nn.Module,
    method: str | Method = "adfq_vit",
    weight_bits: int = 4,
    activation_bits: int = 4,
    calibration: Iterable[Any] | Tensor | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    calibration_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Return a quantized copy of a trained model.

    Args:
        model: a model of a family that has an adapter (`adfq.adapters`); it is left untouched. Its parameters are
            shared until one is written to; what writes past torch, such as a view in NumPy, writes to both.
        method: one of `adfq.methods()`, or a `Method` with its options, such as ``RepQViT()``. ``"full_precision"``
            returns a plain copy and needs no calibration.
        weight_bits: bit-width of weights, 2 to 8; the default is 4. A method may keep single sites at another
            width, and its documentation says so.
        activation_bits: bit-width of activations, 2 to 8; the default is 4.
        calibration: preprocessed images as a tensor B×C×H×W, or an iterable of batches such as a DataLoader, which is
            read until there are enough images. A batch goes through the model at once, a tensor as a whole: memory
            depends on the batch, not on the number of images. Batches may differ in size, and wait in a temporary file.
        seed: seed of the method's random numbers; 0 by default. The global generators stay as they were.
        resume: a folder in which a long calibration or optimization keeps finished units; None, the default, keeps
            nothing. A call with the same arguments continues from it, on a CPU to the same bits. The caller deletes
            the folder.
        calibration_size: number of calibration images. None, the default, takes a tensor whole, and from an iterable
            the method's usual number (`Method.calibration_size`), or all where these are fewer.
        **options: options of a method given by name.

    Returns:
        The quantized model in evaluation mode, its weights replaced by quantized values, with a `Quantization` as
        attribute `quantization`.

    Raises:
        AdfqError: for unknown methods, options and bit-widths, models without an adapter, quantized ones and those
            that cannot be copied, a seed of more than 64 bits, missing or unusable calibration images, a full disk.
        NotApplicableError: for a method that cannot be applied to the model.
        NonFiniteError: for activations or weights that are not finite; it names the layer.
    """
    if isinstance(method, str):
        method = create_method(method, options)
    elif not isinstance(method, Method):
        raise AdfqError(f"method must be a name or an adfq.method.Method, got {type(method).__name__}")
    elif options:
        raise AdfqError(f"give {next(iter(options))} to {type(method).__name__}(…), not to quantize")
    bits = Bits(weight_bits, activation_bits)
    seed = _check_seed(seed)
    folder = None if resume is None else as_path(resume)
    _check_model(model)
    with ordinary_modes():
        model = _copy(model)
        model.eval()  # some models return None here
        if isinstance(method, FullPrecision):
            return model
        run = Run(read_images(calibration, calibration_size, method.calibration_size, folder))
        architecture = describe(model)
        network = adapt(model)
        if network.unsupported:
            names = ", ".join(network.unsupported)
            warnings.warn(f"no rule for these layers, left in full precision: {names}", stacklevel=2)
        if reason := method.supports(network):
            raise NotApplicableError(reason)
        check_input(network, run.images)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            method.apply(network, run, bits)
        for _, layer in network.weight_layers():
            layer.freeze()
    cast(Any, network.model).quantization = Quantization(
        method_name(method), bits, asdict(cast(Any, method)), seed, len(run.images), architecture, report=run.report
    )
    network.model.eval()
    return network.model


def requantize(model: nn.Module) -> nn.Module:
    """Round weights that were trained after quantization to the grids that they were quantized to, in place.

    Args:
        model: model from `quantize` or `adfq.load`.

    Returns:
        The model.

    Raises:
        AdfqError: for a model that is not quantized.
    """
    if not isinstance(getattr(model, "quantization", None), Quantization):
        raise AdfqError("only a model that adfq.quantize has quantized can be quantized anew")
    with ordinary_modes():
        for _, layer in Network(model).weight_layers():
            layer.frozen = False
            layer.freeze()
    return model


def _check_seed(seed: Any) -> int:
    try:
        if -(2**63) <= (number := operator.index(seed)) < 2**63:
            return number
    except TypeError:
        pass
    raise AdfqError(f"seed must be a whole number of at most 64 bits, got {seed!r}")


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise AdfqError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(getattr(model, "quantization", None), Quantization):
        raise AdfqError("the model is quantized already; quantize the one that it was made from")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AdfqError("the model has no values: its parameters are on the device meta")


# Modes, default dtype and random numbers of one thread would be those of the others.
_ALONE = threading.RLock()


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """Switch modes of the caller off inside the block that change results, or tensors that are made in it.

    These are inference mode, no_grad, autocast, and another default dtype or device than float32 and the CPU. Threads
    wait for one another.
    """
    with _ALONE, ExitStack() as modes:
        dtype = torch.get_default_dtype()
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            modes.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            modes.enter_context(torch.device("cpu"))
        modes.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters take memory only once they, or the model's, are written to."""
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        # Memory that torch has not allocated, such as that of a file, cannot be shared.
        with suppress(RuntimeError):
            copies[id(parameter)] = nn.Parameter(parameter.detach()._lazy_clone(), parameter.requires_grad)
    try:
        return copy.deepcopy(model, copies)
    except (RuntimeError, TypeError) as error:  # an activation, a lock, a generator among the attributes
        raise AdfqError(f"the model cannot be copied: {one_line(error)}") from error
