"""Gram matrices of the inputs of a network's linear layers and convolutions, summed over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.calibration.activations import progress_bar
from adfq.calibration.images import CalibrationImages
from adfq.calibration.walk import Part, Walk, with_checked_trunk
from adfq.errors import AdfqError, NonFiniteError
from adfq.layers import QuantConv2d, QuantWeightLayer
from adfq.sites import Network, is_within

#: Inputs that Gram matrices are computed on. X is a layer's input in full precision, X̂ the one that is summed.
#: "full_precision" means X̂ = X, "own" X through the layer's own input quantizer. "quantized" means the input of the
#: network quantized so far, "asymmetric" the same input with the differences X - X̂ beside it.
INPUTS = ("full_precision", "own", "quantized", "asymmetric")

_MOST_INPUTS = 8192  # 0.5 GB a matrix
_MOST_VALUES = 2**27  # in Gram matrices that are summed side by side: 1 GB
_CHUNK = 2**22  # values of the rows that are turned to double precision at once


class Gram:
    """The Gram matrix of a layer's inputs X̂ (N×n) and sums beside it, in double precision.

    A convolution's rows are its patches, in the order channel, y, x.

    Args:
        layer: the layer.
        differences: True to sum X - X̂ too; False by default.

    Attributes:
        products: X̂ᵀX̂, n×n.
        sums: sum of the rows of X̂, n.
        differences: X̂ᵀ(X - X̂), n×n; None without.
        difference_sums: sum of the rows of X - X̂, n; None without.
        rows: N, or the sum of the rows' weights.
        is_flat: True if the inputs have two dimensions, as a classifier's: a row an image.
    """

    differences: Tensor | None
    difference_sums: Tensor | None

    def __init__(self, layer: QuantWeightLayer, differences: bool = False) -> None:
        self.layer = layer
        size = layer.weight[0].numel()
        new = partial(torch.zeros, dtype=torch.float64, device=layer.weight.device)
        self.products, self.sums = new(size, size), new(size)
        self.differences = new(size, size) if differences else None
        self.difference_sums = new(size) if differences else None
        self.rows: float = 0
        self.is_flat = False

    def update(self, quantized: Tensor, x: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Take in the inputs of a batch.

        Args:
            quantized: X̂ in the shape of the layer's input.
            x: X, the shape of `quantized`; None without differences.
            weights: weight of each row in all sums, in the shape of the layer's output without its channels; None, the
                default, for 1.
        """
        self.is_flat = quantized.dim() == 2
        targets = iter(()) if x is None else _rows(self.layer, x)
        shares = None if weights is None else weights.flatten().double()
        for chunk in _rows(self.layer, quantized):
            rows = weighted = chunk.double()
            if shares is not None:
                own, shares = shares.tensor_split([len(rows)])
                weighted = rows * own[:, None]
                self.rows += float(own.sum())
            else:
                self.rows += len(rows)
            self.products.addmm_(weighted.T, rows)
            self.sums += weighted.sum(0)
            if self.differences is not None and self.difference_sums is not None:
                off = next(targets).double() - rows
                self.differences.addmm_(weighted.T, off)
                self.difference_sums += (off if shares is None else off * own[:, None]).sum(0)

    def check_finite(self, name: str) -> None:
        """Raise NonFiniteError if an input was NaN or infinite.

        Args:
            name: name of the layer, for the message.
        """
        if not all(torch.isfinite(x).all() for x in (self.products, self.differences) if x is not None):
            raise NonFiniteError(f"{name}: its inputs are not finite (NaN or infinity)")


def _rows(layer: QuantWeightLayer, x: Tensor) -> Iterator[Tensor]:
    """Yield the rows that a layer multiplies its weight with, a few at a time: each rows×n."""
    size = layer.weight[0].numel()
    if not x.numel():  # no proposal in an image
        return
    if not isinstance(layer, QuantConv2d):
        yield from x.reshape(-1, size).split(max(1, _CHUNK // size))
        return
    strides, dilations = cast("tuple[int, int]", layer.stride), cast("tuple[int, int]", layer.dilation)
    x = F.pad(x, _padding(layer))
    reach = dilations[0] * (layer.kernel_size[0] - 1) + 1
    height, width = (x.shape[2] - reach) // strides[0] + 1, x.shape[3] // strides[1] + 1
    step = max(1, _CHUNK // (size * width))  # rows of the output, of a single image
    for image in x.split(1):
        for start in range(0, height, step):
            last = min(start + step, height) - 1
            strip = image[:, :, start * strides[0] : last * strides[0] + reach]
            yield F.unfold(strip, layer.kernel_size, dilations, 0, strides)[0].T


def _padding(layer: QuantConv2d) -> list[int]:
    """Return the padding left, right, above and below."""
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(0, 0)] * 2 if layer.padding == "valid" else [(int(size), int(size)) for size in layer.padding]
    return [*pairs[1], *pairs[0]]


def has_gram(layer: QuantWeightLayer) -> bool:
    """Return True for a layer that has a Gram matrix: no convolution in groups, and not too many inputs.

    Args:
        layer: any layer.
    """
    return (not isinstance(layer, QuantConv2d) or layer.groups == 1) and layer.weight[0].numel() <= _MOST_INPUTS


def grams_of_layers(
    network: Network,
    images: CalibrationImages,
    inputs: str,
    teacher: Network | None = None,
    weights: Mapping[str, Sequence[Tensor]] | None = None,
) -> Iterator[tuple[str, QuantWeightLayer, Gram | None]]:
    """Yield each quantizable layer with the Gram matrix of its inputs, None for one that has none (`has_gram`).

    The network is walked part by part, so that memory does not depend on the number of images. With ``"quantized"``
    and ``"asymmetric"`` the layers of a part come one after the other: a caller that quantizes a layer as it comes
    finds that in the inputs of the next ones. A layer that is used several times has all its inputs summed.

    Args:
        network: network with calibrated activation quantizers.
        images: calibration images.
        inputs: one of `INPUTS`. Behind the trunk, where inputs may depend on quantized choices such as a detector's
            proposals, ``"asymmetric"`` is ``"quantized"``; not so with a teacher in a model that makes no such choices.
        teacher: copy of the network that gives the inputs in full precision, for a caller that changes biases; None,
            the default, for the network itself.
        weights: by the name of a layer, weights of the rows of one use in a batch after the other
            (`adfq.reconstruction.importance_of_rows`). They count where inputs have differences. None, the default, for
            1; so has a layer that is not there.

    Raises:
        AdfqError: for a full disk.
        NonFiniteError: for inputs that hold NaN or infinity; the message names the layer.
    """
    layers = dict(network.weight_layers())
    walked = with_checked_trunk(network, images)
    exact = walked if teacher is None else with_checked_trunk(teacher, images)
    kinds = {"full_precision": (True,), "own": (True,), "quantized": (False,), "asymmetric": (False, True)}[inputs]
    walks = [Walk(exact if kind else walked, images, kind) for kind in kinds]
    aligned = teacher is not None and teacher.forward_all is None
    with progress_bar("compensating weights", len(layers)) as progress:
        for parts in zip(*(walk.parts() for walk in walks), strict=True):
            within = {name: layers[name] for name in list(layers) if is_within(name, parts[0].name)}
            for name, layer in within.items():
                del layers[name]
                if not has_gram(layer):
                    yield name, layer, None
            found = {name: layer for name, layer in within.items() if has_gram(layer)}
            together = inputs in ("full_precision", "own")
            for group in _groups(found, inputs) if together else [[name] for name in found]:
                asymmetric = inputs == "asymmetric" and (bool(parts[0].name) or aligned)
                shares = {name: (weights or {}).get(name) for name in group} if asymmetric else {}
                grams = _collect(walks, parts, {name: found[name] for name in group}, inputs, asymmetric, shares)
                for name in group:
                    gram = grams.pop(name)
                    gram.check_finite(name)
                    yield name, found[name], gram
                    progress.update()


def _groups(layers: Mapping[str, QuantWeightLayer], inputs: str) -> Iterator[list[str]]:
    """Yield names of layers whose Gram matrices fit the memory together."""
    group: list[str] = []
    values = 0
    for name, layer in layers.items():
        own = layer.weight[0].numel() ** 2 * (2 if inputs == "own" else 1)
        if group and values + own > _MOST_VALUES:
            yield group
            group, values = [], 0
        group.append(name)
        values += own
    if group:
        yield group


def _collect(
    walks: Sequence[Walk],
    parts: Sequence[Part],
    layers: Mapping[str, QuantWeightLayer],
    inputs: str,
    asymmetric: bool,
    weights: Mapping[str, Sequence[Tensor] | None],
) -> dict[str, Gram]:
    """Return the Gram matrices of layers of a part, from one pass over its batches."""
    # In full precision the layers have no quantizers.
    quantizers = {name: layer.input_quantizer for name, layer in layers.items()}
    grams = {name: Gram(layer, asymmetric or inputs == "own") for name, layer in layers.items()}
    targets: dict[str, list[Tensor]] = {name: [] for name in layers}
    shares = {name: iter(found) for name, found in weights.items() if found is not None}

    def keep(name: str, x: Tensor) -> None:
        targets[name].append(x)

    def take(name: str, x: Tensor) -> None:
        if inputs == "full_precision":
            grams[name].update(x)
        elif inputs == "own":
            grams[name].update(quantizers[name](x), x)
        else:
            share = next(shares[name]) if name in shares else None
            grams[name].update(quantizers[name](x), targets[name].pop(0) if asymmetric else None, share)

    for batch in range(len(parts[0].sizes)):
        if asymmetric:
            exact = {name: walks[1].network.model.get_submodule(name) for name in layers}
            _run(walks[1].mode(), parts[1], batch, exact, keep)
        _run(walks[0].mode(), parts[0], batch, layers, take)
    return grams


def _run(
    mode: AbstractContextManager[None],
    part: Part,
    batch: int,
    layers: Mapping[str, nn.Module],
    observe: Callable[[str, Tensor], None],
) -> None:
    """Take a batch through a part, and show the inputs of layers on the way."""
    hooks = [layer.register_forward_pre_hook(partial(_observe, observe, name)) for name, layer in layers.items()]
    try:
        with mode, torch.no_grad():
            part.run(batch)
    finally:
        for hook in hooks:
            hook.remove()


def _observe(observe: Callable[[str, Tensor], None], name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    observe(name, inputs[0].detach())


def cholesky(matrix: Tensor, name: str) -> Tensor:
    """Return the lower Cholesky factor of a symmetric positive definite matrix.

    Args:
        matrix: n×n, double precision.
        name: name of the option that makes it positive definite, for the message.

    Raises:
        AdfqError: for a matrix that is not, up to rounding.
    """
    factor: Tensor
    factor, problem = torch.linalg.cholesky_ex(matrix)
    if problem:
        raise AdfqError(f"{name} is too small: the Gram matrix of a layer's inputs cannot be inverted")
    return factor
