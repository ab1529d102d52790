"""Activation functions whose output channels have units of their own."""

from __future__ import annotations

from torch import Tensor, nn

from adfq.errors import AdfqError
from adfq.transforms.relu import is_gelu_mlp, linears_of


class ScaledActivation(nn.Module):
    """An activation function whose output is divided by a factor for each channel.

    The factor is one of quantization: a quantizer multiplies by the inverse of its step size anyway, and with a factor
    by one of a row and one of a channel.

    Args:
        activation: the activation function.
        like: weight of the layer behind it, out×C, for number of channels, dtype and device.

    Attributes:
        activation: the activation function.
        ratio: factors, C; 1 until they are set.
    """

    ratio: Tensor

    def __init__(self, activation: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("ratio", like.new_ones(like.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled output of the activation function.

        Args:
            x: …×C.
        """
        output: Tensor = self.activation(x)
        return output / self.ratio


def scale_activation(model: nn.Module, name: str) -> ScaledActivation:
    """Put a `ScaledActivation` in the place of an MLP's GELU, and return it.

    Args:
        model: an adapted model.
        name: name of the MLP.

    Raises:
        AdfqError: for a module that is no MLP of two linear layers with a GELU between.
    """
    found = dict(model.named_modules()).get(name)
    if found is None or not is_gelu_mlp(found):
        raise AdfqError(f"{name} is no MLP with a GELU")
    scaled = ScaledActivation(found.get_submodule("act"), linears_of(found)[1].weight.detach())
    found.act = scaled
    return scaled


def scaled_activations(model: nn.Module) -> list[str]:
    """Return the names of the MLPs with a `ScaledActivation`.

    Args:
        model: any model.
    """
    return [name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, ScaledActivation)]
