"""PTQ4ViT (ECCV 2022, arXiv 2111.12293): twin uniform quantization, scales found by a Hessian-guided search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.bits import Bits
from adfq.calibration import progress_bar
from adfq.errors import AdfqError, NonFiniteError, NotApplicableError
from adfq.layers import QuantConv2d, QuantMatMul, QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from adfq.quantizers.twin import GELU_DEPTH, SPLITS
from adfq.sites import Network, Recipe

SEARCHES = ("hessian", "mse")
FACTORS = tuple(0.01 + 0.0119 * i for i in range(100))  # candidate scales, in parts of the one that holds every value

# Sizes of the samples that scales are searched on: number of matrices of a batched product, and of rows of each; a
# layer with a weight has as many rows in all. Every candidate is tried on the coarse sample and the best on the fine
# one. The scale found is the best on everything for most layers, and within a few percent of its score for the others.
_COARSE = (16, 8)
_FINE = (64, 32)
_SHORTLIST = 8

_ROUNDING = 1e-6  # a spread below this share of the values is that of rounding
_LOBE = 1.01 * GELU_DEPTH  # in half precision, GELU's own values lie a little lower

_LOSS_SCALE = 256.0  # scores do not depend on it; in half precision, small gradients would vanish without it


@dataclass(frozen=True)
class PTQ4ViT(Method):
    """PTQ4ViT: symmetric uniform quantization, twin uniform after softmax and GELU, scales searched per layer.

    The input image stays in full precision. A weight has one scale, but a fused projection to queries, keys and values
    one for each of these, and the patch embedding one per output channel. An activation has one scale. Behind another
    activation function than GELU a uniform quantizer stands in place of the twin one.

    The two scales of a layer are searched in turn for the smallest error of its output, with all other layers in full
    precision. Errors are weighted by the squared gradient of the loss (section "Hessian guided metric").

    The gradient is that of the empirical Fisher information: of the cross-entropy against a label drawn from the
    model's own prediction, or of its like for a detector's outputs (`_fisher_loss`). The released code differentiates
    a distance between the prediction and itself, which is 0 but for rounding. Errors are taken on a sample of the
    output's rows (`sample_rows`).

    Attributes:
        search: ``"hessian"``, or ``"mse"`` for errors that all weigh the same.
        rounds: number of searches over both scales of a layer.
        gradient_batch_size: images in one pass forwards and backwards. More take more memory, but less time on a GPU.
        released: True sums both grids after softmax, as the released code does.
    """

    label = "PTQ4ViT"
    paper = "arXiv 2111.12293"

    search: str = "hessian"
    rounds: int = 3
    gradient_batch_size: int = 1
    released: bool = False

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise AdfqError(f"unknown search {self.search!r}; there are {', '.join(SEARCHES)}")
        if self.rounds < 1 or self.gradient_batch_size < 1:
            raise AdfqError("rounds and gradient_batch_size must be at least 1")

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation),
            weight=partial(UniformQuantizer, bits.weight),
            activations={
                "patch_embed": lambda: None,
                "probs": partial(TwinSoftmaxQuantizer, bits.activation, self.released),
                "fc2": partial(TwinGeluQuantizer, bits.activation),
            },
            weights={"patch_embed": partial(UniformQuantizer, bits.weight, "row")},
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`.

        Raises:
            NotApplicableError: for a model whose output is neither images × classes nor a list (``"hessian"``).
        """
        weighted = self.search == "hessian"
        for name, layer in network.weight_layers():
            _check_finite(f"{name}.weight", layer.weight)
        layers: list[tuple[str, QuantWeightLayer | QuantMatMul]] = [*network.weight_layers(), *network.matmuls()]
        batches = run.images.split(self.gradient_batch_size)
        observers = [_Observer(name, layer, len(batches), weighted) for name, layer in layers]
        with progress_bar("searching scales", len(batches) + len(observers)) as progress:
            hooks = [observer.layer.register_forward_hook(observer.observe) for observer in observers]
            try:
                for batch in batches:
                    _run(network, batch, weighted)
                    progress.update()
            finally:
                for hook in hooks:
                    hook.remove()
            network.attach(self.recipe(bits))
            for _, layer in network.weight_layers():
                if layer.parts > 1:
                    layer.weight_quantizer = UniformQuantizer(bits.weight, "row")
            for observer in observers:
                observer.check_lobe()
                search_scales(observer.product(_COARSE), observer.product(_FINE), self.rounds)
                progress.update()


def _run(network: Network, images: Tensor, backward: bool) -> None:
    """Run the model once, and backwards once, through every layer and without gradients of weights.

    Gradients go back to the images, and to biases, frozen ones too: a mask decoder's tokens and the queries of
    attention pooling, for example, are not computed from images.
    """
    images = network.place(images).clone().requires_grad_(backward)
    biases = [layer.bias for _, layer in network.weight_layers() if layer.bias is not None]
    frozen = [bias for bias in biases if not bias.requires_grad]
    try:
        for bias in frozen:
            bias.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            outputs = network.run(images)
            if backward:
                torch.autograd.grad(_LOSS_SCALE * _fisher_loss(outputs), [images, *biases], allow_unused=True)
    finally:
        for bias in frozen:
            bias.requires_grad_(False)


def _fisher_loss(outputs: Tensor | list[Tensor]) -> Tensor:
    """Return a loss whose squared gradients are the empirical Fisher information of the outputs.

    For logits (B×classes) it is the cross-entropy against a label drawn from the prediction. Several outputs, as a
    detector has, count as means of Gaussians, each with the variance of its tensor: the loss is the distance to a value
    drawn from these. An output whose values are all equal has no variance, and is left out.
    """
    if isinstance(outputs, Tensor):
        if outputs.dim() != 2:
            raise NotApplicableError(
                f"a gradient needs logits, images × classes; the model gives {tuple(outputs.shape)}"
            )
        outputs = outputs.float()
        _check_finite("logits", outputs)
        labels = outputs.detach().softmax(-1).multinomial(1)[:, 0]
        return F.cross_entropy(outputs, labels, reduction="sum")
    losses = []
    for output in outputs:
        _check_finite("outputs", output)
        values = output.detach().float()
        spread, drawn = values.std(correction=0), torch.randn_like(values)
        if spread > _ROUNDING * values.abs().amax():
            losses.append((output.float() / spread * drawn).sum())
    if not losses:
        raise NotApplicableError("a gradient needs outputs that vary; all values of each output are equal")
    return torch.stack(losses).sum()


def _check_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"{name}: values are not finite (NaN or infinity)")


# --- samples for the search -----------------------------------------------------------------------------------------


class _Observer:
    """Observer of a layer while the model runs, which keeps samples for the search.

    A layer is seen as products left @ rightᵀ of P×M×inner and P×N×inner. For a layer with a weight, P is 1 (the number
    of groups of a convolution), left the weight and right the tokens. For a matrix product, P is images × heads (Swin:
    windows × heads), left the queries or probabilities, right the keys or values.
    """

    def __init__(self, name: str, layer: QuantWeightLayer | QuantMatMul, batches: int, weighted: bool) -> None:
        self.name, self.layer, self.batches, self.weighted = name, layer, batches, weighted
        self.largest: list[list[Tensor]] = []
        self.lowest = math.inf
        self.kept: dict[tuple[int, int], list[tuple[Tensor, ...]]] = {_COARSE: [], _FINE: []}

    def observe(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Observe a forward pass of the layer, as a forward hook, and return its output."""
        for operand in inputs:
            _check_finite(self.name, operand)
        if not self.weighted:
            self.keep(inputs, torch.ones_like(output))
        elif output.requires_grad:
            if output._is_view() and getattr(self.layer, "role", None) == "head":
                output = output.clone()  # detectors change it in place, and a view would lose its hook by that
            output.register_hook(partial(self.keep, inputs))
        return output

    @torch.no_grad()
    def keep(self, inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
        """Keep a weighted sample of rows of the first input and the gradient, and all of the second input."""
        _check_finite(f"gradient at {self.name}", gradient)
        self.largest.append([operand.abs().max().float() for operand in inputs])
        if getattr(self.layer, "role", None) == "fc2":
            self.lowest = min(self.lowest, float(inputs[0].min()))
        choose, sizes, gradient = _as_rows(self.layer, inputs[0].float(), gradient.float())
        for (matrices, rows), kept in self.kept.items():
            if isinstance(self.layer, QuantWeightLayer):
                matrices, rows = self.batches, math.ceil(matrices * rows / self.batches)
            which, chosen, weights = sample_rows(sizes, gradient, math.ceil(matrices / self.batches), rows)
            others = [operand.flatten(0, -3)[which].float() for operand in inputs[1:]]
            which = which[:, None]
            kept.append((choose(which, chosen), gradient[which, chosen] * weights.sqrt()[..., None], *others))

    def check_lobe(self) -> None:
        """Put a uniform quantizer in the place of the twin one for inputs that lie below GELU's negative lobe.

        Other activation functions have a deeper one: SiLU. The twin quantizer would clip there.
        """
        quantizer = self.layer.input_quantizer if isinstance(self.layer, QuantWeightLayer) else None
        if isinstance(quantizer, TwinGeluQuantizer) and self.lowest < -_LOBE:
            self.layer.input_quantizer = UniformQuantizer(quantizer.bits)

    def product(self, size: tuple[int, int]) -> Product:
        """Return the kept sample of a size."""
        if not self.kept[size]:
            raise AdfqError(f"{self.name} saw no calibration data: the model does not use this layer")
        layer = self.layer
        dimension = 1 if isinstance(layer, QuantWeightLayer) else 0
        x, gradient, *others = (torch.cat(parts, dimension) for parts in zip(*self.kept.pop(size), strict=True))
        largest = [torch.stack(maxima).amax(0, keepdim=True) for maxima in zip(*self.largest, strict=True)]
        if isinstance(layer, QuantMatMul):
            left = Operand(x, layer.left_quantizer, largest[0])
            as_rows = None if layer.transpose_right else partial(torch.transpose, dim0=-2, dim1=-1)
            return Product(left, Operand(others[0], layer.right_quantizer, largest[1], as_rows), gradient)
        weight = layer.weight.detach().float()
        products = layer.groups if isinstance(layer, QuantConv2d) else 1
        groups = len(weight) if layer.role == "patch_embed" else layer.parts
        groups = groups if products == 1 else 1
        maxima = weight.reshape(groups, -1).abs().amax(1)
        as_rows = partial(torch.reshape, shape=(products, len(weight) // products, -1))
        left = Operand(weight, layer.weight_quantizer, maxima, as_rows)
        x, gradient = (rows[0].unflatten(1, (products, -1)).transpose(0, 1) for rows in (x, gradient))
        return Product(left, Operand(x, layer.input_quantizer, largest[0]), gradient.mT.contiguous())


def _as_rows(
    layer: QuantWeightLayer | QuantMatMul, x: Tensor, gradient: Tensor
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """Return a layer's first input as P×rows×inner, and the gradient at its output as P×rows×columns.

    A row of a convolution is a position of its output: the patch that all groups read there, one after the other.

    Returns:
        A function from indices of matrices and of rows in them to rows of the input, the squared norms of all rows
        (P×rows), and the gradient.
    """
    if isinstance(layer, QuantMatMul):
        x, gradient = x.flatten(0, -3), gradient.flatten(0, -3)
    else:
        if isinstance(layer, QuantConv2d):
            gradient = gradient.movedim(1, -1)
        gradient = gradient.reshape(1, -1, gradient.shape[-1])
        if isinstance(layer, QuantConv2d) and layer.groups > 1:
            # Not all patches: those of a depthwise convolution, whose input is the largest, take many times its room.
            sizes = _lay_out(layer, x.square().sum(1, keepdim=True)).sum(1)
            return lambda _, chosen: _choose_patches(layer, x, chosen), sizes.reshape(1, -1), gradient
        if isinstance(layer, QuantConv2d):
            x = _lay_out(layer, x).movedim(1, -1)
        x = x.reshape(1, -1, x.shape[-1])
    return lambda which, chosen: x[which, chosen], x.square().sum(-1), gradient


def _lay_out(layer: QuantConv2d, x: Tensor) -> Tensor:
    """Return the patch under the kernel at each position of a convolution's output.

    B×C×H×W becomes B×(C·kernel)×H'×W'.
    """
    # A convolution with the unit matrix lays out the patches, whatever stride and padding.
    kernel = layer.weight.shape[2:]
    inner = x.shape[1] * kernel.numel()
    unit = torch.eye(inner, dtype=x.dtype, device=x.device).reshape(inner, -1, *kernel)
    return F.conv2d(x, unit, None, layer.stride, layer.padding, layer.dilation)


def _choose_patches(layer: QuantConv2d, x: Tensor, chosen: Tensor) -> Tensor:
    """Return patches of `_lay_out` at chosen rows of all images' positions.

    1×rows becomes 1×rows×(C·kernel).
    """
    # Pixels by number, 0 for padding; exact in double precision, also where a GPU rounds convolutions.
    numbers = torch.arange(1, x[0, 0].numel() + 1, dtype=torch.float64, device=x.device)
    pixels = _lay_out(layer, numbers.reshape(1, 1, *x.shape[2:])).long().flatten(2)
    image, position = chosen // pixels.shape[-1], chosen % pixels.shape[-1]
    pixels = pixels[0, :, position].movedim(0, -1).unsqueeze(2)
    channels = torch.arange(x.shape[1], device=x.device)[:, None]
    values = x.flatten(2)[image[..., None, None], channels, pixels - 1]
    return (values * (pixels > 0)).flatten(2)


def sample_rows(sizes: Tensor, gradient: Tensor, products: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows of a layer's output for an unbiased, close estimate of the sum of weighted squared errors.

    Full scores are sums over thousands of rows; a few hundred, the same for all candidates, tell these apart as well. A
    row is drawn in proportion to the error it can contribute: its squared gradient, times a part that is alike for all
    rows (rounding) plus a part that grows with its values (clipping). Behind the last attention, say, only class tokens
    have a gradient, and only they are drawn.

    Args:
        sizes: squared norms of the input's rows, P×M.
        gradient: P×M×N.
        products: number of the P matrices to draw; all, if there are no more.
        rows: number of the M rows of each to draw; all, if there are no more.

    Returns:
        Indices of matrices (products), indices of rows of each (products×rows), and the weights of their squared errors
        (products×rows).
    """
    # Relative to the largest, so that nothing underflows; the floor is for images without any gradient.
    gradient = gradient / gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)
    sizes = sizes.double()
    mass = gradient.square().sum(-1) * (1 + sizes / sizes.mean().clamp(min=1e-300)) + 1e-12
    which, product_weights = _draw(mass.sum(1), products)
    chosen, row_weights = _draw(mass[which], rows)
    return which, chosen, (product_weights[:, None] * row_weights).to(gradient.dtype)


def _draw(mass: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw indices along the last dimension, one from each equal share of the mass.

    Draws of different shares are independent: at equal distances they could meet the same token of every image.

    Returns:
        Indices, and the inverse of their expected numbers.
    """
    total = mass.shape[-1]
    if total <= count:
        return torch.arange(total, device=mass.device).expand(mass.shape), torch.ones_like(mass)
    share = mass / mass.sum(-1, keepdim=True)
    offsets = torch.rand(*mass.shape[:-1], count, dtype=mass.dtype, device=mass.device)
    points = (torch.arange(count, device=mass.device) + offsets) / count
    indices = torch.searchsorted(share.cumsum(-1), points).clamp_(max=total - 1)
    return indices, 1 / (count * share.gather(-1, indices))


# --- the search -----------------------------------------------------------------------------------------------------


class Operand:
    """Side of a product, with its quantizer and the candidates for its scale.

    Args:
        values: operand in the shape that the quantizer meets.
        quantizer: a `Quantizer`, which gets the scale that holds every value, or nn.Identity.
        largest: largest absolute value of each group of rows that shares a scale, G.
        as_rows: function from `values` to P×rows×inner; None, the default, for values in that shape.

    Attributes:
        candidates: candidates for the scale, C×G.
    """

    def __init__(
        self,
        values: Tensor,
        quantizer: nn.Module,
        largest: Tensor,
        as_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.values, self.quantizer, self.as_rows = values, quantizer, as_rows or (lambda values: values)
        whole, factors = torch.where(largest > 0, largest, 1.0), FACTORS
        if isinstance(quantizer, TwinSoftmaxQuantizer):
            whole, factors = torch.full_like(largest, 1 / quantizer.steps), SPLITS
        elif isinstance(quantizer, Quantizer):
            whole = whole / (quantizer.levels / 2 - 0.5)
        self.candidates = torch.tensor(factors, device=whole.device)[:, None] * whole
        self.set_scale(whole)

    def set_scale(self, scale: Tensor) -> None:
        """Set the quantizer's scale for each group.

        Args:
            scale: G.
        """
        if not isinstance(self.quantizer, Quantizer):
            return
        if len(scale) == 1:
            scale = scale[0]
        else:
            rows = len(self.values)
            scale = scale.repeat_interleave(rows // len(scale)).reshape(rows, *[1] * (self.values.dim() - 1))
        self.quantizer.scale = scale
        if isinstance(self.quantizer, UniformQuantizer):
            self.quantizer.zero_point = torch.full_like(scale, self.quantizer.levels // 2)

    def rows(self, quantized: bool) -> Tensor:
        """Return the operand as P×rows×inner.

        Args:
            quantized: True for quantized values, False for full precision.
        """
        return self.as_rows(self.quantizer(self.values) if quantized else self.values)


class Product:
    """Product left @ rightᵀ in full precision, the reference of the two quantized operands.

    Args:
        left: P×M×inner as rows.
        right: P×N×inner as rows.
        gradient: factors of the errors before they are squared, P×M×N.
    """

    def __init__(self, left: Operand, right: Operand, gradient: Tensor) -> None:
        self.operands = (left, right)
        self.target = left.rows(quantized=False) @ right.rows(quantized=False).mT
        largest = gradient.abs().max()
        self.gradient = gradient / largest if largest > 0 else torch.ones_like(gradient)

    def scores(self, index: int, candidates: Tensor) -> Tensor:
        """Return sums of weighted squared errors, C×G, for C×G scales of one operand.

        The product is linear in that operand: the other is quantized once, and a candidate costs one matrix product.

        Args:
            index: 0 for the left operand, 1 for the right one.
            candidates: scales, C×G.
        """
        searched = self.operands[index]
        quantized = [operand.rows(quantized=True) for operand in self.operands]
        scores = []
        for scale in candidates:
            searched.set_scale(scale)
            quantized[index] = searched.rows(quantized=True)
            error = torch.baddbmm(self.target, quantized[0], quantized[1].mT, alpha=-1).mul_(self.gradient)
            # Groups are of rows of a weight, which is the left operand; else there is one.
            scores.append(error.square_().sum((0, 2)).reshape(len(scale), -1).sum(1))
        return torch.stack(scores)


@torch.no_grad()
def search_scales(coarse: Product, fine: Product, rounds: int) -> None:
    """Set the scales of a layer's quantizers, the left one's first, to the candidates with the smallest errors.

    Args:
        coarse: small sample of the layer's product.
        fine: large sample of it, with the same quantizers.
        rounds: number of searches of both operands, in turn.
    """
    searched = [index for index in (0, 1) if isinstance(fine.operands[index].quantizer, Quantizer)]
    chosen: list[Tensor] = []
    for _ in range(rounds if len(searched) > 1 else 1):
        before, chosen = chosen, []
        for index in searched:
            operand = fine.operands[index]
            best = coarse.scores(index, operand.candidates).topk(_SHORTLIST, dim=0, largest=False).indices
            shortlist = operand.candidates.gather(0, best)
            best = fine.scores(index, shortlist).argmin(0, keepdim=True)
            chosen.append(shortlist.gather(0, best)[0])
            operand.set_scale(chosen[-1])
        if before and all(map(torch.equal, before, chosen)):  # as would be all further rounds
            break
