"""Scales of their own for tokens and channels, which start from shared ones and can be learned apart."""

from __future__ import annotations

from torch import Tensor, nn

from adfq.calibration import CalibrationImages
from adfq.layers import QuantMatMul, QuantWeightLayer
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
    sites = [site for name in network.blocks for site in _sites_with_fixed_positions(network, name)]
    shapes = _shapes(network, {site.name: quantizer for site in sites if (quantizer := site.quantizer)}, images)
    for site in sites:
        quantizer, found = site.quantizer, shapes.get(site.name, set())
        if not isinstance(quantizer, UniformQuantizer) or len(found) != 1:
            continue
        (shape,) = found
        wanted: tuple[int, ...]
        if isinstance(site.operator, QuantMatMul):
            transposed = site.attribute == "right_quantizer" and not site.operator.transpose_right
            wanted = (1, shape[1], 1, shape[3]) if transposed else (1, shape[1], shape[2], 1)
        elif len(shape) == 3:
            wanted = (1, shape[1], 1)
        else:
            continue
        quantizer.scale = quantizer.scale.expand(wanted).clone()


def _sites_with_fixed_positions(network: Network, block: str) -> list[Site]:
    """Return the activations of a block; none if token positions of one of its layers differ between images."""
    sites = [site for site in sites_of(network.model, block) if not site.is_weight]
    layers = [site.operator for site in sites if isinstance(site.operator, QuantWeightLayer)]
    return sites if all(layer.fixed_positions for layer in layers) else []


def _shapes(
    network: Network, quantizers: dict[str, nn.Module], images: CalibrationImages
) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes that quantizers meet, without the first dimension, by the name of their site."""
    found: dict[str, set[tuple[int, ...]]] = {name: set() for name in quantizers}

    def note(name: str, x: Tensor) -> None:
        found[name].add((0, *x.shape[1:]))

    hooks = [
        quantizer.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name, quantizer in quantizers.items()
    ]
    try:
        for image in images.one_of_each_shape():
            network.run(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: shapes for name, shapes in found.items() if all(len(shape) in (3, 4) for shape in shapes)}
