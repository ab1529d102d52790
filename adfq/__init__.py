"""Post-training quantization for vision transformers: ADFQ-ViT and the core that baselines share."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adfq.api import Quantization, quantize, requantize
    from adfq.checkpoint import load, save
    from adfq.errors import AdfqError, NonFiniteError, NotApplicableError
    from adfq.export import export_onnx
    from adfq.method import Bits, Method
    from adfq.registry import methods

__version__ = version("adfq")
__all__ = [
    "AdfqError",
    "Bits",
    "Method",
    "NonFiniteError",
    "NotApplicableError",
    "Quantization",
    "export_onnx",
    "load",
    "methods",
    "quantize",
    "requantize",
    "save",
]

_MODULES = {
    "api": ("Quantization", "quantize", "requantize"),
    "checkpoint": ("load", "save"),
    "errors": ("AdfqError", "NonFiniteError", "NotApplicableError"),
    "export": ("export_onnx",),
    "method": ("Bits", "Method"),
    "registry": ("methods",),
}


def __getattr__(name: str) -> Any:
    # On demand, so that a command or a plan does not wait for torch before it needs it.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"adfq.{module}"), name)
    raise AttributeError(f"module 'adfq' has no attribute {name!r}")
