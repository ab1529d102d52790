"""The protocol of a method, where methods are found, and ADFQ-ViT itself."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from adfq.adapters import Architecture, adapt, describe
from adfq.calibration import calibrate_activations, gather_batches, quantize_weights
from adfq.errors import AdfqError
from adfq.quantizers import (
    LogQuantizer,
    PerPatchOutlierQuantizer,
    RunTimePatchOutlierQuantizer,
    ShiftLogQuantizer,
    UniformQuantizer,
)
from adfq.quantizers.base import check_bits
from adfq.reconstruction import Settings, optimize_modules
from adfq.sites import MakeQuantizer, Network, Recipe

FULL_PRECISION = "full_precision"
ENTRY_POINT_GROUP = "adfq.methods"


@dataclass(frozen=True)
class Bits:
    """Bit-widths of weights and activations, each 2 to 8; AdfqError otherwise."""

    weight: int
    activation: int

    def __post_init__(self) -> None:
        check_bits(self.weight)
        check_bits(self.activation)

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Reads ``W4A4`` or ``W4/A4``.

        Raises:
            AdfqError: for anything else, and for bit-widths outside 2 to 8.
        """
        match = re.fullmatch(r"W(\d+)/?A(\d+)", text, re.IGNORECASE)
        if match is None:
            raise AdfqError(f"cannot read bits {text!r}; write W4A4 (weights 2 to 8 bits, activations 2 to 8 bits)")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"W{self.weight}/A{self.activation}"


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized; `quantize` leaves it at the model as its attribute `quantization`.

    Attributes:
        method: its name.
        bits: as asked for.
        options: every option of the method, with its default where none was given.
        seed: of the method.
        calibration_size: the number of calibration images.
        architecture: the model that was quantized.
        notes: what `adfq.save` was asked to keep with the model; JSON's types.
        report: what the method has to say of its work, such as the errors of optimized modules; not saved.
    """

    method: str
    bits: Bits
    options: Mapping[str, Any]
    seed: int
    calibration_size: int
    architecture: Architecture
    notes: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """Quantizes a network in place: attaches quantizers, quantizes weights, calibrates activations.

    A method is a function; its keyword-only parameters are its options. It is found by the name of its entry
    point in the group ``adfq.methods``, which any installed package may have.
    """

    def __call__(self, network: Network, images: Tensor, bits: Bits, **options: Any) -> None: ...


def methods() -> tuple[str, ...]:
    """The names of all installed methods, `full_precision` first."""
    return FULL_PRECISION, *sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)})


def check_method(name: str, options: Iterable[str] = ()) -> None:
    """Raises AdfqError, saying which exist, for a method or an option of one that does not."""
    known = {} if name == FULL_PRECISION else _defaults(load_method(name))
    for option in options:
        if option not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            raise AdfqError(f"method {name} has no option {option!r}; {there_are}")


def load_method(name: str) -> Method:
    """The method of that name.

    Raises:
        AdfqError: saying which exist, for one that does not.
    """
    found = entry_points(group=ENTRY_POINT_GROUP, name=name)
    if not found:
        raise AdfqError(f"unknown method {name!r}; there are {', '.join(methods())}")
    method: Method = next(iter(found)).load()
    return method


def _defaults(method: Method) -> dict[str, Any]:
    """A method's options with their defaults."""
    parameters = inspect.signature(method).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def quantize(
    model: nn.Module,
    method: str = "adfq_vit",
    weight_bits: int = 4,
    activation_bits: int = 4,
    calibration: Iterable[Any] | Tensor | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """Quantizes a model after training.

    Args:
        model: of a family that has an adapter (`adfq.adapters`); it is left untouched.
        method: one of `methods()`. ``"full_precision"`` gives a copy of the model and needs no calibration.
        weight_bits, activation_bits: 2 to 8. Methods may keep single sites at other widths, and say so.
        calibration: images as a tensor B×C×H×W, or an iterable of batches (a DataLoader, say).
        seed: for methods that draw random numbers; the global generators are left as they were.
        resume: a folder. A method that optimizes for long leaves there what it has finished, and a call with the same
            arguments goes on from it, to the same bits on a CPU. The folder is the caller's to delete.
        **options: the method's own.

    Returns:
        The quantized model in evaluation mode, with its weights quantized once and for all, and with a
        `Quantization` as its attribute `quantization`.

    Raises:
        AdfqError: for unknown methods, options and bit-widths, models that have no adapter, missing or unusable
            calibration images.
        NonFiniteError: naming the layer, for activations or weights that are not finite.
    """
    check_method(method, options)
    model = _copy(model)
    model.eval()  # which not every model gives back
    if method == FULL_PRECISION:
        return model
    bits = Bits(weight_bits, activation_bits)
    images = gather_batches(calibration)
    architecture = describe(model)
    network = replace(adapt(model), resume=None if resume is None else Path(resume))
    if network.floating_point:
        warnings.warn(
            f"no rule for these layers, left in full precision: {', '.join(network.floating_point)}", stacklevel=2
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        apply = load_method(method)
        apply(network, images, bits, **options)
    for _, layer in network.weight_layers():
        layer.freeze()
    options = _defaults(apply) | options
    cast(Any, network.model).quantization = Quantization(
        method, bits, options, seed, len(images), architecture, report=network.report
    )
    network.model.eval()
    return network.model


def _copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters take memory of their own only once they, or the model's, are written to."""
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        # Memory that torch has not allocated, such as that of a file, cannot be shared.
        with suppress(RuntimeError):
            copies[id(parameter)] = nn.Parameter(parameter.detach()._lazy_clone(), parameter.requires_grad)
    return copy.deepcopy(model, copies)


def adfq_vit(
    network: Network,
    images: Tensor,
    bits: Bits,
    *,
    qkv_threshold: float = 5.0,
    fc1_threshold: float = 10.0,
    log_base: float = 2**0.5,
    shift: str = "dynamic",
    patch_embed_bits: int = 8,
    ppoq: bool = True,
    slq: bool = True,
    iterations: int = Settings.iterations,
    optimize_batch_size: int = Settings.optimize_batch_size,
    mix_probability: float = Settings.mix_probability,
    attention_weight: float = Settings.attention_weight,
    temperature: float = Settings.temperature,
    rounding_weight: float = Settings.rounding_weight,
    rounding_learning_rate: float = Settings.rounding_learning_rate,
    step_learning_rate: float = Settings.step_learning_rate,
    held_back: float = Settings.held_back,
    autocast: bool = Settings.autocast,
    released: bool = Settings.released,
) -> None:
    """ADFQ-ViT (arXiv 2407.02763): per-patch outlier-aware quantizers after LayerNorm (PPOQ), shift-log2 quantizers
    after GELU (SLQ), attention-score enhanced module-wise optimization (AMO).

    Where token positions differ from image to image, as in a detector or in Segment Anything outside of windows, PPOQ
    takes a patch's range from the patch itself at run time. AMO optimizes attentions (with the scores of all of them,
    across too), MLPs, convolution stages, patch embedding and mergings, a classifier's head, and neck and heads of
    Segment Anything; a detector's neck and heads are calibrated.

    Options:
        qkv_threshold: α before attention, and before Swin's patch merging.
        fc1_threshold: α before the MLP.
        log_base: of the shift-log2 quantizer after GELU.
        shift: its minimum, ``"dynamic"`` or ``"static"``.
        patch_embed_bits: of the input image.
        ppoq, slq: without them, uniform quantizers per tensor stand in their places.
        iterations: of AMO, for each module; 0 leaves the calibrated network as it is.
        optimize_batch_size, mix_probability, attention_weight, temperature, rounding_weight, rounding_learning_rate,
        step_learning_rate, held_back, autocast, released: of AMO, `adfq.reconstruction.Settings`.
    """
    settings = Settings(
        iterations=iterations,
        optimize_batch_size=optimize_batch_size,
        mix_probability=mix_probability,
        attention_weight=attention_weight,
        temperature=temperature,
        rounding_weight=rounding_weight,
        rounding_learning_rate=rounding_learning_rate,
        step_learning_rate=step_learning_rate,
        held_back=held_back,
        autocast=autocast,
        released=released,
    )
    activation = bits.activation
    activations: dict[str, MakeQuantizer] = {
        "patch_embed": lambda: UniformQuantizer(patch_embed_bits, range="percentile"),
        "query": lambda: UniformQuantizer(activation, range="mse"),
        "key": lambda: UniformQuantizer(activation, range="mse"),
        "probs": lambda: LogQuantizer(activation),
        "value": lambda: UniformQuantizer(activation, range="mse"),
    }
    run_time: dict[str, MakeQuantizer] = {}
    if ppoq:
        for role, threshold in (("qkv", qkv_threshold), ("fc1", fc1_threshold), ("reduction", qkv_threshold)):
            activations[role] = partial(PerPatchOutlierQuantizer, activation, threshold)
            run_time[role] = partial(RunTimePatchOutlierQuantizer, activation, threshold)
    if slq:
        activations["fc2"] = lambda: ShiftLogQuantizer(activation, log_base, shift)
    network.attach(
        Recipe(
            activation=lambda: UniformQuantizer(activation, range="percentile"),
            weight=lambda: UniformQuantizer(bits.weight, "row", "percentile"),
            activations=activations,
            run_time=run_time,
        )
    )
    quantize_weights(network)
    if iterations:
        results = optimize_modules(network, images, settings)
        network.report["modules"] = {name: asdict(result) for name, result in results.items()}
    calibrate_activations(network, images)  # all, or what is in no module
