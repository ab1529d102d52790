"""Images that a classifier got right, as records keep them: a bit for each evaluation image, packed, in base64."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: By metric, for each evaluation image in order, whether it was right: images.
Correct = dict[str, NDArray[np.bool_]]

_ROUNDING = 1e-6  # in points, between a metric and the mean of its bits


def pack_correct(correct: Mapping[str, NDArray[np.bool_]]) -> dict[str, str]:
    """Return the form that a record keeps.

    Args:
        correct: by metric, images.
    """
    return {metric: base64.b64encode(np.packbits(bits).tobytes()).decode() for metric, bits in correct.items()}


def unpack_correct(record: Mapping[str, Any]) -> Correct:
    """Return the bits of a record, by metric; nothing for a record without them.

    Args:
        record: with ``metrics``, and perhaps ``correct`` from `pack_correct`.

    Raises:
        ValueError: for bits that are none, are not as many as the record has images, or do not give its metric.
        TypeError: for a record with parts of another type.
        KeyError: for bits of a metric that the record does not have.
    """
    unpacked: Correct = {}
    for metric, text in dict(record.get("correct", {})).items():
        images, value = int(record["metrics"]["images"]), record["metrics"][metric]
        packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
        bits = np.unpackbits(packed).astype(bool)
        if images < 1 or len(packed) != (images + 7) // 8 or bits[images:].any():
            raise ValueError(f"{metric}: its bits are not those of {images} images")
        if abs(100 * bits[:images].mean() - value) > _ROUNDING:
            raise ValueError(f"{metric}: its bits give another value than {value}")
        unpacked[metric] = bits[:images]
    return unpacked
