"""Looks at the inputs of modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def input_hooks(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Call functions with the inputs of modules inside the block, which runs in inference mode.

    Args:
        hooks: modules, each with a function that takes the module and its inputs, and returns None.
    """
    handles = [module.register_forward_pre_hook(look) for module, look in hooks]
    try:
        with torch.inference_mode():
            yield
    finally:
        for handle in handles:
            handle.remove()
