"""The protocol of a method, where methods are found, and ADFQ-ViT itself."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.calibration import calibrate_activations, gather_batches, quantize_weights
from adfq.errors import AdfqError
from adfq.quantizers import LogQuantizer, PerPatchOutlierQuantizer, ShiftLogQuantizer, UniformQuantizer
from adfq.quantizers.base import check_bits
from adfq.sites import Network, Recipe

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
    if name == FULL_PRECISION:
        known: list[str] = []
    else:
        parameters = inspect.signature(_load(name)).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            raise AdfqError(f"method {name} has no option {option!r}; {there_are}")


def _load(name: str) -> Method:
    found = entry_points(group=ENTRY_POINT_GROUP, name=name)
    if not found:
        raise AdfqError(f"unknown method {name!r}; there are {', '.join(methods())}")
    method: Method = next(iter(found)).load()
    return method


def quantize(
    model: nn.Module,
    method: str = "adfq_vit",
    weight_bits: int = 4,
    activation_bits: int = 4,
    calibration: Iterable[Any] | Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Quantizes a model after training.

    Args:
        model: of a family that has an adapter (`adfq.adapters`); it is left untouched.
        method: one of `methods()`. ``"full_precision"`` gives a copy of the model and needs no calibration.
        weight_bits, activation_bits: 2 to 8. Methods may keep single sites at other widths, and say so.
        calibration: images as a tensor B×C×H×W, or an iterable of batches (a DataLoader, say).
        seed: for methods that draw random numbers; the global generators are left as they were.
        **options: the method's own.

    Returns:
        The quantized model in evaluation mode, with its weights quantized once and for all.

    Raises:
        AdfqError: for unknown methods, options and bit-widths, models that have no adapter, missing or unusable
            calibration images, and activations or weights that are not finite (naming the layer).
    """
    check_method(method, options)
    if method == FULL_PRECISION:
        return copy.deepcopy(model).eval()
    bits = Bits(weight_bits, activation_bits)
    images = gather_batches(calibration)
    network = adapt(copy.deepcopy(model).eval())
    if network.floating_point:
        warnings.warn(
            f"no rule for these layers, left in full precision: {', '.join(network.floating_point)}", stacklevel=2
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _load(method)(network, images, bits, **options)
    for _, layer in network.weight_layers():
        layer.freeze()
    return network.model.eval()


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
) -> None:
    """ADFQ-ViT (arXiv 2407.02763): per-patch outlier-aware and shift-log2 quantizers, calibrated.

    Options:
        qkv_threshold: α before attention, and before Swin's patch merging.
        fc1_threshold: α before the MLP.
        log_base: of the shift-log2 quantizer after GELU.
        shift: its minimum, ``"dynamic"`` or ``"static"``.
        patch_embed_bits: of the input image.
    """
    activation = bits.activation
    network.attach(
        Recipe(
            activation=lambda: UniformQuantizer(activation, range="percentile"),
            weight=lambda: UniformQuantizer(bits.weight, "row", "percentile"),
            activations={
                "patch_embed": lambda: UniformQuantizer(patch_embed_bits, range="percentile"),
                "qkv": lambda: PerPatchOutlierQuantizer(activation, qkv_threshold),
                "query": lambda: UniformQuantizer(activation, range="mse"),
                "key": lambda: UniformQuantizer(activation, range="mse"),
                "probs": lambda: LogQuantizer(activation),
                "value": lambda: UniformQuantizer(activation, range="mse"),
                "fc1": lambda: PerPatchOutlierQuantizer(activation, fc1_threshold),
                "fc2": lambda: ShiftLogQuantizer(activation, log_base, shift),
                "reduction": lambda: PerPatchOutlierQuantizer(activation, qkv_threshold),
            },
        )
    )
    quantize_weights(network)
    calibrate_activations(network, images)
