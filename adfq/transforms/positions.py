"""Scales of their own for tokens and channels, which start from shared ones and can be learned apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from adfq.calibration import CalibrationImages
from adfq.layers import QuantConv2d, QuantMatMul, QuantWeightLayer
from adfq.quantizers import UniformQuantizer
from adfq.sites import Network, Site, sites_of


def spread_scales(network: Network, images: CalibrationImages) -> None:
    """Give each token a step size in the blocks with fixed token positions, as FIMA-Q does.

    The step size of a linear layer's input becomes 1×N×1, that of a matrix product's left operand 1×heads×rows×1, and
    of its right one 1×heads×1×columns of the product. Values and zero points stay.

    Args:
        network: network with calibrated quantizers.
        images: calibration images.
    """
    for site, shape in sites_with_fixed_positions(network, images, network.blocks):
        quantizer = site.quantizer
        if not isinstance(quantizer, UniformQuantizer):
            continue
        wanted: tuple[int, ...]
        if isinstance(site.operator, QuantMatMul):
            wanted = (1, shape[1], 1, shape[3]) if has_columns(site) else (1, shape[1], shape[2], 1)
        elif len(shape) == 3:
            wanted = (1, shape[1], 1)
        else:
            continue
        quantizer.scale = quantizer.scale.expand(wanted).clone()


def has_columns(site: Site) -> bool:
    """Return True for the right operand of a matrix product whose last dimension is not summed over: `value`.

    Args:
        site: an activation.
    """
    operator = site.operator
    return isinstance(operator, QuantMatMul) and site.attribute == "right_quantizer" and not operator.transpose_right


def sites_with_fixed_positions(
    network: Network, images: CalibrationImages, parts: Sequence[str]
) -> Iterator[tuple[Site, tuple[int, ...]]]:
    """Yield the activations whose token positions do not differ between images, with their shapes.

    Inputs of convolutions have no tokens, and are left out.

    Args:
        network: network with quantizers or without.
        images: calibration images.
        parts: names of modules, such as blocks; one with a layer whose token positions differ is left out.

    Yields:
        Site, and the shape of its values with 0 as the first size: three or four dimensions.
    """
    sites = [site for name in parts for site in _sites_with_fixed_positions(network, name)]
    shapes = _shapes(network, sites, images)
    for site in sites:
        if len(found := shapes[site.name]) == 1:
            (shape,) = found
            if len(shape) in (3, 4):
                yield site, shape


def _sites_with_fixed_positions(network: Network, part: str) -> list[Site]:
    """Return the activations of a module; none if token positions of one of its layers differ between images."""
    sites = [site for site in sites_of(network.model, part) if not site.is_weight]
    layers = [site.operator for site in sites if isinstance(site.operator, QuantWeightLayer)]
    fixed = all(layer.fixed_positions for layer in layers)
    return [site for site in sites if not isinstance(site.operator, QuantConv2d)] if fixed else []


@torch.no_grad()
def _shapes(network: Network, sites: Sequence[Site], images: CalibrationImages) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes that sites meet in full precision, with 0 as the first size, by the name of the site."""
    found: dict[str, set[tuple[int, ...]]] = {site.name: set() for site in sites}

    def note(site: Site, inputs: tuple[Tensor, ...]) -> None:
        found[site.name].add((0, *inputs[site.attribute == "right_quantizer"].shape[1:]))

    with ExitStack() as hooks, network.full_precision():
        for site in sites:
            hook = site.operator.register_forward_pre_hook(lambda _, inputs, site=site: note(site, inputs))
            hooks.callback(hook.remove)
        for image in images.one_of_each_shape():
            network.run(image)
    return found
