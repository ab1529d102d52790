"""MobileSAM's image encoder, which segment_anything does not have, and its adapter."""

from __future__ import annotations

from typing import Any, cast

from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import Attention, ConvNorm, MBConv, NormMlp, PatchEmbed, PatchMerging, TinyVit, TinyVitBlock
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from adfq.adapters import pair, replace, replace_attention
from adfq.adapters.sam_factory import create as create
from adfq.adapters.sam_factory import describe as describe
from adfq.errors import AdfqError
from adfq.layers import QuantLinear, QuantMatMul
from adfq.plain import check_plain, keeps_forward
from adfq.sites import Network


class MobileSamEncoder(nn.Module):
    """Image encoder of MobileSAM (arXiv 2306.14289): timm's TinyViT and SAM's neck.

    Images B×3×S×S become embeddings B×C×(S/16)×(S/16).

    Args:
        img_size: S in pixels, a multiple of 16.
        embed_dims: channels of TinyViT's stages.
        depths: blocks of its stages.
        num_heads: attention heads of its stages.
        window_sizes: side of its stages' windows in tokens.
        out_chans: C.

    Attributes:
        trunk: TinyViT without its head; its last stage keeps the resolution.
        neck: convolutions and norms of SAM's own encoder.
    """

    def __init__(
        self,
        img_size: int = 1024,
        embed_dims: tuple[int, ...] = (64, 128, 160, 320),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (2, 4, 5, 10),
        window_sizes: tuple[int, ...] = (7, 7, 14, 7),
        out_chans: int = 256,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        trunk: type[Any] = TinyVit
        self.trunk = trunk(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, window_sizes=window_sizes, drop_path_rate=0.0
        )
        self.trunk.head = nn.Identity()
        self.trunk.stages[-1].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dims[-1], out_chans, 1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings, B×C×(S/16)×(S/16).

        Args:
            x: images, B×3×S×S.
        """
        embeddings: Tensor = self.neck(self.trunk.forward_features(x))
        return embeddings


class QuantTinyAttention(nn.Module):
    """timm's TinyViT Attention with its two matrix products made explicit.

    Input and output (windows·B)×N×C.

    Args:
        attention: module to replace, whose parameters are shared.
    """

    attention_bias_idxs: Tensor

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.sizes = (attention.key_dim, attention.key_dim, attention.val_dim)
        self.attention_biases = attention.attention_biases
        self.register_buffer("attention_bias_idxs", cast(Tensor, attention.attention_bias_idxs), persistent=False)
        self.norm = attention.norm
        self.qkv = QuantLinear(attention.qkv, "qkv")
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.context = QuantMatMul(("probs", "value"))
        self.proj = QuantLinear(attention.proj, "proj")

    def forward(self, x: Tensor) -> Tensor:
        """Return attention within each window: (windows·B)×N×C.

        Args:
            x: (windows·B)×N×C.
        """
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query, key, value = qkv.split(self.sizes, -1)
        scores = self.scores(query * self.scale, key) + self.attention_biases[:, self.attention_bias_idxs]
        probs = self.softmax(scores)
        del scores  # as large as what is still to come
        context = self.context(probs, value)
        output: Tensor = self.proj(context.transpose(1, 2).flatten(2))
        return output


def adapt(model: nn.Module) -> Network:
    """Adapt an encoder, see `adfq.adapters.adapt`.

    Batch normalizations are folded into their convolutions, as they are wherever such a network runs quantized.

    Args:
        model: MobileSamEncoder.
    """
    norms: dict[str, nn.LayerNorm] = {}
    modules, trunk = [], []
    for name, module in list(model.named_modules()):
        if isinstance(module, ConvNorm):
            _fold(model, name)
            replace(model, f"{name}.conv", _convolution_role(name), fixed_positions=False)
        elif isinstance(module, (PatchEmbed, MBConv, PatchMerging)):
            modules.append(name)
            trunk.append(name)
        elif isinstance(module, TinyVitBlock):
            norm = module.attn.norm
            replace_attention(model, f"{name}.attn", Attention, QuantTinyAttention)
            replace(model, f"{name}.mlp.fc1", "fc1", fixed_positions=False)
            replace(model, f"{name}.mlp.fc2", "fc2", fixed_positions=False)
            pair(norms, f"{name}.attn.qkv", norm)
            if keeps_forward(module.mlp, NormMlp):
                pair(norms, f"{name}.mlp.fc1", module.mlp.norm)
            modules += [f"{name}.attn", f"{name}.local_conv", f"{name}.mlp"]
            trunk.append(name)
    neck = adapt_neck(model)
    return Network(model, norms, (*modules, neck), trunk=(*trunk, neck), forward_all=listed)


def adapt_neck(encoder: nn.Module) -> str:
    """Replace the convolutions of an image encoder's neck, and return its name as a unit of reconstruction.

    Args:
        encoder: SAM's or MobileSAM's image encoder.
    """
    for index in (0, 2):
        replace(encoder, f"neck.{index}", "neck", fixed_positions=False)
    return "neck"


def _convolution_role(name: str) -> str:
    """Return the role of a convolution by its name.

    The first convolution of each part reads the part's input; the others read GELU's output.
    """
    if name == "trunk.patch_embed.conv1":
        return "patch_embed"
    return "conv" if name.endswith(("conv1", "local_conv")) else "fc2"


def _fold(model: nn.Module, name: str) -> None:
    part: Any = model.get_submodule(name)
    conv, norm = part.conv, part.bn
    check_plain(conv, nn.Conv2d, f"{name}.conv")
    check_plain(norm, nn.BatchNorm2d, f"{name}.bn")
    if not keeps_forward(part, ConvNorm):
        raise AdfqError(f"{name}: cannot fold the norm of a {type(part).__name__} with a forward of its own")
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    model.set_submodule(f"{name}.bn", nn.Identity())


def listed(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Return an encoder's features as several outputs are, since they are no logits.

    Args:
        encoder: image encoder.
        images: B×3×S×S, preprocessed.
    """
    return [encoder(images)]
