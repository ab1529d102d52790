"""Entry of an ONNX file's metadata that says how the model was quantized and what images it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from adfq.api import Quantization
from adfq.errors import AdfqError

#: Key of the entry.
KEY = "adfq"


def describe_graph(model: nn.Module, kind: str, input_size: tuple[int, int, int]) -> str:
    """Return the entry as JSON: ``method``, ``bits``, ``kind`` and, as far as the model tells it, ``preprocessing``.

    The preprocessing of a classifier is timm's data configuration. That of Segment Anything is the ``size`` of the
    longer side, to which zeros fill up the shorter one after normalization, and ``mean`` and ``std`` of values from 0
    to 255. That of a detector has ``mean`` and ``std`` of such values, the order of ``channels`` and
    ``pad_size_divisor``.

    Args:
        model: whole quantized model.
        kind: kind of a `Graph`.
        input_size: channels, height and width in pixels.

    Raises:
        AdfqError: for preprocessing that JSON cannot hold, such as NaN.
    """
    quantization = cast(Quantization, model.quantization)
    entry: dict[str, Any] = {"method": quantization.method, "bits": str(quantization.bits), "kind": kind}
    preprocessing = _preprocessing(model, quantization, kind, input_size)
    if preprocessing:
        entry["preprocessing"] = preprocessing
    try:
        return json.dumps(entry, sort_keys=True, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise AdfqError(f"cannot write the model's preprocessing to the file: {error}") from None


def _plain(value: Any) -> Any:
    """Return a number or array of numpy, or a tensor, as Python's own numbers."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _preprocessing(
    model: Any, quantization: Quantization, kind: str, input_size: tuple[int, int, int]
) -> Mapping[str, Any]:
    if kind == "backbone":
        return {"input_size": list(input_size), **_of_detector(model)}
    if kind in ("image_encoder", "mask_decoder"):
        statistics = {"mean": "pixel_mean", "std": "pixel_std"}
        found = {
            key: getattr(model, name).flatten().tolist() for key, name in statistics.items() if hasattr(model, name)
        }
        return {"size": input_size[1], **found}
    noted = quantization.notes.get("preprocessing")
    if noted:
        return cast(Mapping[str, Any], noted)
    if not getattr(model, "pretrained_cfg", None):
        return {}
    from timm.data import resolve_model_data_config

    try:
        config = resolve_model_data_config(model)
    except Exception as error:  # whatever timm makes of values of another type
        raise AdfqError(f"the model's pretrained_cfg has no use as preprocessing: {error}") from None
    return {**config, "input_size": list(input_size)}


def _of_detector(model: Any) -> Mapping[str, Any]:
    given = getattr(model, "data_preprocessor", None)
    if given is None or not hasattr(given, "mean"):
        return {}
    return {
        "mean": given.mean.flatten().tolist(),
        "std": given.std.flatten().tolist(),
        "channels": "rgb" if given._channel_conversion else "bgr",  # images are read in OpenCV's order
        "pad_size_divisor": given.pad_size_divisor,
    }
