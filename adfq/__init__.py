"""Post-training quantization for vision transformers: ADFQ-ViT and the core that baselines share."""

from importlib.metadata import version

from adfq.checkpoint import load, save
from adfq.errors import AdfqError, NonFiniteError
from adfq.export import export_onnx
from adfq.methods import methods, quantize

__version__ = version("adfq")
__all__ = ["AdfqError", "NonFiniteError", "export_onnx", "load", "methods", "quantize", "save"]
