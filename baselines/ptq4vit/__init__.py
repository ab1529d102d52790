"""PTQ4ViT (ECCV 2022, arXiv 2111.12293): twin uniform quantization, scales found by a Hessian-guided search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adfq.bits import Bits
from adfq.calibration import progress_bar
from adfq.errors import AdfqError, NotApplicableError
from adfq.layers import QuantMatMul, QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from adfq.reconstruction.fisher import are_logits, check_gradient, output_spread, output_tensors
from adfq.sites import Network, Recipe
from baselines.ptq4vit.observers import COARSE, FINE, Observer, check_finite
from baselines.ptq4vit.search import search_scales

SEARCHES = ("hessian", "mse")

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
    output's rows (`baselines.ptq4vit.samples.Sample`), whose size does not depend on the number of images.

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
            NotApplicableError: for a model whose output is a tensor other than images × classes, or has no gradient
                (``"hessian"``).
        """
        weighted = self.search == "hessian"
        for name, layer in network.weight_layers():
            check_finite(f"{name}.weight", layer.weight)
        layers: list[tuple[str, QuantWeightLayer | QuantMatMul]] = [*network.weight_layers(), *network.matmuls()]
        observers = [Observer(name, layer, weighted) for name, layer in layers]
        uniform = iter(torch.rand(len(run.images)).tolist())  # an image's label is the same in every grouping of images
        with progress_bar("searching scales", len(run.images) + len(observers)) as progress:
            hooks = [observer.layer.register_forward_hook(observer.observe) for observer in observers]
            try:
                for batch in run.images.split(self.gradient_batch_size):
                    _run(network, batch, list(islice(uniform, len(batch))) if weighted else None)
                    progress.update(len(batch))
            finally:
                for hook in hooks:
                    hook.remove()
            network.attach(self.recipe(bits))
            for _, layer in network.weight_layers():
                if layer.parts > 1:
                    layer.weight_quantizer = UniformQuantizer(bits.weight, "row")
            while observers:
                observer = observers.pop(0)  # and its sample with it
                observer.check_lobe()
                search_scales(observer.product(COARSE), observer.product(FINE), self.rounds)
                progress.update()


def _run(network: Network, images: Tensor, uniform: list[float] | None) -> None:
    """Run the model once, and backwards once, through every layer and without gradients of weights.

    Gradients go back to the images, and to biases, frozen ones too: a mask decoder's tokens and the queries of
    attention pooling, for example, are not computed from images.

    Args:
        network: network with observers.
        images: B×C×H×W.
        uniform: the random number of each image (`_fisher_loss`); None for no run backwards.
    """
    backward = uniform is not None
    images = network.place(images).clone().requires_grad_(backward)
    biases = [layer.bias for _, layer in network.weight_layers() if layer.bias is not None]
    frozen = [bias for bias in biases if not bias.requires_grad]
    try:
        for bias in frozen:
            bias.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            outputs = network.run(images)
            if uniform is not None:
                torch.autograd.grad(_LOSS_SCALE * _fisher_loss(outputs, uniform), [images, *biases], allow_unused=True)
    finally:
        for bias in frozen:
            bias.requires_grad_(False)


def _fisher_loss(outputs: Any, uniform: list[float]) -> Tensor:
    """Return a loss whose squared gradients are the empirical Fisher information of the outputs.

    For logits (B×classes) it is the cross-entropy against a label drawn from the prediction. Several outputs, as a
    detector has, count as means of Gaussians, each with the variance of its tensor: the loss is the distance to a value
    drawn from these. An output whose values are all equal has no variance, and is left out.

    Args:
        outputs: logits, or any nesting of outputs of any shape.
        uniform: a random number from 0 to 1 for each image's label; without effect on several outputs.

    Raises:
        NotApplicableError: for outputs without a gradient.
        NonFiniteError: for outputs that hold NaN or infinity.
    """
    if isinstance(outputs, Tensor) and outputs.dim() != 2:
        raise NotApplicableError(f"a gradient needs logits, images × classes; the model gives {tuple(outputs.shape)}")
    found = output_tensors(outputs)
    for output in found:
        check_finite("logits" if are_logits(found) else "outputs", output)
    check_gradient(found, found)
    if are_logits(found):
        logits = found[0].float()
        cumulative = logits.detach().softmax(-1).double().cumsum(-1)
        points = cumulative.new_tensor(uniform)[:, None] * cumulative[:, -1:]
        labels = torch.searchsorted(cumulative, points, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
        return F.cross_entropy(logits, labels, reduction="sum")
    losses = []
    for output in found:
        spread, drawn = output_spread(output), torch.randn_like(output.detach().float())
        if spread is not None:
            losses.append((output.float() / spread * drawn).sum())
    return torch.stack(losses).sum()
