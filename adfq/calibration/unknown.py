"""The trace of values that are not known yet, through code that NaN does not get through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adfq.calibration.walk import Enough


class Trace(TorchDispatchMode):
    """A context that follows which tensors depend on marked ones.

    NaN marks unknown values in arithmetic. Comparisons, choices such as topk, and sampling at unknown places turn it
    into numbers: detectors choose proposals by scores, and sample features there. Here whatever is computed from an
    unknown tensor is unknown, and so is a tensor that one is written to. The pass ends (`Enough`) where the model's own
    course, or the shape of a tensor, depends on an unknown value. Arrays and lists that tensors are turned into are not
    followed; those hold NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unknown: set[StorageWeakRef] = set()

    def mark(self, x: Tensor) -> Tensor:
        """Mark a tensor, and every view of it, as unknown, and return it."""
        self._unknown.add(StorageWeakRef(x.untyped_storage()))
        return x

    def __contains__(self, x: Tensor) -> bool:
        return StorageWeakRef(x.untyped_storage()) in self._unknown

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator of torch, and mark what depends on unknown values."""
        keywords = dict(kwargs or {})
        unknown = [leaf for leaf in tree_leaves((args, keywords)) if isinstance(leaf, Tensor) and leaf in self]
        if unknown and _shapes_output(func, unknown):
            raise Enough
        output = func(*args, **keywords)
        if unknown:
            changed = [
                args[index] if index < len(args) else keywords.get(argument.name)
                for index, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            for leaf in tree_leaves((output, changed)):
                if isinstance(leaf, Tensor):
                    self.mark(leaf)
                elif isinstance(leaf, (bool, int, float)):
                    raise Enough
        return output


def _shapes_output(func: Any, unknown: Sequence[Tensor]) -> bool:
    """Return True if the shape of an operator's output depends on the values of the unknown inputs."""
    if func.namespace == "aten" and func.overloadpacket.__name__ == "index":
        return any(x.dtype in (torch.bool, torch.uint8) for x in unknown)
    return torch.Tag.dynamic_output_shape in func.tags or "nms" in func.name()
