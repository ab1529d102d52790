"""Calibration of a network by the errors of its layers' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from adfq.bits import Bits
from adfq.calibration import calibrate_activations, progress_bar
from adfq.calibration.passes import naming
from adfq.calibration.walk import Part, Walk, with_checked_trunk
from adfq.errors import NonFiniteError
from adfq.layers import QuantMatMul, QuantWeightLayer
from adfq.method import Run
from adfq.output_error.grids import LEAST_ACTIVATION_SCALE
from adfq.output_error.operands import EndsOperand, LogOperand, Operand
from adfq.output_error.samples import Sample, Sampler
from adfq.output_error.scores import Shape
from adfq.output_error.search import search_by_itself, search_layer, search_patch_embedding, search_product
from adfq.output_error.settings import Settings
from adfq.quantizers import AdaLogQuantizer, Quantizer, UniformQuantizer
from adfq.quantizers.twin import GELU_DEPTH
from adfq.sites import POST_NORM_ROLES, Network, is_within, operators_of
from adfq.transforms.reparameterization import NormGroup, norms_with_readers, reparameterize

_Operator = QuantWeightLayer | QuantMatMul

_LOBE = 1.01 * GELU_DEPTH  # in half precision, GELU's own values lie a little lower


def calibrate_by_output_error(network: Network, run: Run, bits: Bits, settings: Settings) -> None:
    """Quantize a network in place, with ranges of the smallest error of each layer's output.

    Every layer is searched on full-precision inputs, for the full-precision output, on samples of constant size. Layers
    behind a LayerNorm are first searched per channel, and then reparameterized to one scale (`adfq.transforms`). The
    network goes through the trunk part by part, so that only one part's samples are held.

    Layers that do not fit get ranges per tensor, and per output channel in weights, of the percentile search, as behind
    the layers that are quantized then: those that are used several times in a pass, convolutions other than a patch
    embedding, and products without heads. A logarithmic quantizer behind GELU's place that meets values below GELU's is
    a uniform one.

    Args:
        network: network without quantizers.
        run: calibration images.
        bits: bit-widths of weights and activations.
        settings: settings of the search.

    Raises:
        AdfqError: for a site that the model does not use; the message names it. For a full disk.
        NonFiniteError: for weights or activations that hold NaN or infinity; the message names the layer.
    """
    for name, layer in network.weight_layers():
        if not torch.isfinite(layer.weight).all():
            raise NonFiniteError(f"{name}.weight: values are not finite (NaN or infinity)")
    network.attach(settings.recipe(bits))
    groups = norms_with_readers(network, POST_NORM_ROLES)
    operators = dict(operators_of(network.model))
    walk = Walk(with_checked_trunk(network, run.images), run.images, full_precision=True)
    with progress_bar("searching scales", len(operators)) as progress, torch.no_grad():
        for part in walk.parts():
            found = {name: operators.pop(name) for name in list(operators) if is_within(name, part.name)}
            with walk.mode():
                samples = _sample(part, found)
            _reparameterize(groups, samples, settings)
            for name in found:
                if name in samples:
                    with naming(name):
                        _search(found[name], samples.pop(name), settings)
                else:
                    _attach_plain(name, found[name], bits)
                progress.update()
    calibrate_activations(network, run.images)


def _sample(part: Part, operators: Mapping[str, _Operator]) -> dict[str, Sample]:
    """Return the samples of the operators that fit, by name, from a pass of all images through a part."""
    samplers = {name: Sampler(name, operator) for name, operator in operators.items()}
    hooks = [samplers[name].operator.register_forward_pre_hook(samplers[name].observe) for name in samplers]
    try:
        for batch, size in enumerate(part.sizes):
            for sampler in samplers.values():
                sampler.begin(size / sum(part.sizes))
            if samplers:
                part.run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sample for name, sampler in samplers.items() if (sample := sampler.sample) is not None}


def _reparameterize(groups: Sequence[NormGroup], samples: dict[str, Sample], settings: Settings) -> None:
    """Give the norms' readers among a part's layers one scale, and change their samples accordingly."""
    names = {sample.operator: name for name, sample in samples.items()}
    for group in groups:
        found = [samples[names[layer]] for layer in group.layers if layer in names]
        if len(found) < len(group.layers):
            continue
        (values,) = found[0].values
        quantizer = group.layers[0].input_quantizer
        assert isinstance(quantizer, UniformQuantizer)
        operand = Operand(values, (1, 1, 1, values.shape[-1]), quantizer.levels, LEAST_ACTIVATION_SCALE)
        search_by_itself(operand, settings)
        by_channel = UniformQuantizer(quantizer.bits, "channel", quantizer.range)
        by_channel.set_range(operand.scale, operand.zero_point, operand.groups.any(1))
        for layer in group.layers:
            layer.input_quantizer = by_channel
        ratio, offset = reparameterize(*group, whole_zero_point=True)
        for sample in found:
            sample.values = (sample.values[0] / ratio - offset,)


def _search(operator: _Operator, sample: Sample, settings: Settings) -> None:
    """Search for the quantizers of an operator, and set them."""
    if isinstance(operator, QuantMatMul):
        heads = sample.values[0].shape[1]
        left, right = (
            _operand(values, quantizer, (1, heads, 1, 1), settings.ends, LEAST_ACTIVATION_SCALE)
            for values, quantizer in zip(
                sample.values, (operator.left_quantizer, operator.right_quantizer), strict=True
            )
        )
        search_product(left, right, settings)
        _set(operator.left_quantizer, left, left.shape)
        _set(operator.right_quantizer, right, right.shape)
        return
    (values,) = sample.values
    rows = operator.weight.detach().float().flatten(1)[None, None]
    in_full_precision = not isinstance(operator.input_quantizer, Quantizer)
    weight = _operand(rows, operator.weight_quantizer, (1, 1, rows.shape[2], 1), settings.ends and in_full_precision)
    shape = [rows.shape[2]] + [1] * (operator.weight.dim() - 1)
    if in_full_precision:
        search_patch_embedding(Operand(values, (1, 1, 1, 1), 0), weight, settings)
    else:
        _replace_logarithmic(operator, values)
        tokens = _operand(values, operator.input_quantizer, (1, 1, 1, 1), False, LEAST_ACTIVATION_SCALE)
        search_layer(tokens, weight, settings)
        _set(operator.input_quantizer, tokens, ())
    _set(operator.weight_quantizer, weight, shape)


def _operand(values: Tensor, quantizer: nn.Module, shape: Shape, ends: bool, least: float = 0.0) -> Operand:
    if isinstance(quantizer, AdaLogQuantizer):
        return LogOperand(values, quantizer)
    assert isinstance(quantizer, UniformQuantizer)
    return (EndsOperand if ends else Operand)(values, shape, quantizer.levels, least)


def _set(quantizer: nn.Module, operand: Operand, shape: Shape) -> None:
    """Set a uniform quantizer to what was found; a logarithmic one is set already."""
    if isinstance(quantizer, UniformQuantizer):
        quantizer.set_range(operand.scale.reshape(shape).clone(), operand.zero_point.reshape(shape).clone())


def _replace_logarithmic(layer: QuantWeightLayer, values: Tensor) -> None:
    """Put a uniform quantizer in the place of the logarithmic one where that clips below or has only zeros."""
    quantizer = layer.input_quantizer
    if isinstance(quantizer, AdaLogQuantizer) and (float(values.min()) < -_LOBE or float(values.max()) <= 0):
        layer.input_quantizer = UniformQuantizer(quantizer.bits, range="percentile")


def _attach_plain(name: str, operator: _Operator, bits: Bits) -> None:
    """Give an operator that is not searched ranges per tensor and per output channel, and quantize its weight."""
    plain = partial(UniformQuantizer, bits.activation, range="percentile")
    if isinstance(operator, QuantMatMul):
        operator.left_quantizer, operator.right_quantizer = plain(), plain()
        return
    if isinstance(operator.input_quantizer, Quantizer):
        operator.input_quantizer = plain()
    with naming(f"{name}.weight"):
        operator.find_weight_range()
