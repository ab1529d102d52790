"""Parts of a network that rotations act on: residual streams, and heads of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stream:
    """A residual stream: the sum of some layers' outputs, read through LayerNorms.

    All names are those of modules and parameters of the adapted model. Nothing else writes to the stream or reads it.

    Attributes:
        name: name for reports, that of the part of the model with the stream.
        width: number of its channels C.
        writers: by the name of a layer whose output is added to it, the name of the parameter (C) that scales this
            output, LayerScale's; empty for none.
        norms: by the name of a LayerNorm over the channels of one token, or of several side by side, the names of the
            linear layers that read its output. It is empty where something else reads that.
        readers: names of layers that read it without a norm.
        tokens: names of parameters (…×C) that are added to it or are tokens of it.
        interleaved: names of the LayerNorms over several tokens that have each channel of all tokens side by side, in
            place of each token's channels.
    """

    name: str
    width: int
    writers: Mapping[str, str]
    norms: Mapping[str, tuple[str, ...]]
    readers: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    interleaved: tuple[str, ...] = ()

    def within(self, prefix: str) -> Stream:
        """Return the stream of a model that has this one's as a part.

        Args:
            prefix: name of the part, with a dot behind.
        """
        return Stream(
            prefix + self.name,
            self.width,
            {prefix + writer: scale and prefix + scale for writer, scale in self.writers.items()},
            {prefix + norm: tuple(prefix + layer for layer in layers) for norm, layers in self.norms.items()},
            tuple(prefix + layer for layer in self.readers),
            tuple(prefix + token for token in self.tokens),
            tuple(prefix + norm for norm in self.interleaved),
        )


@dataclass(frozen=True)
class Heads:
    """The heads of an attention, with d channels each.

    Attributes:
        name: name of the attention.
        qkv: name of the layer whose outputs are queries, keys and values, 3×heads×d.
        proj: name of the layer whose inputs are the outputs of the heads, heads×d.
        count: number of heads.
        query_key: the reason why queries and keys cannot be rotated; empty, the default, where they can.
        value: the reason why values cannot be rotated; empty, the default, where they can.
        positions: names of parameters (…×d) that every head's queries are multiplied with too, relative positions.
    """

    name: str
    qkv: str
    proj: str
    count: int
    query_key: str = ""
    value: str = ""
    positions: tuple[str, ...] = ()

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters of both layers, there or not."""
        return [f"{layer}.{kind}" for layer in (self.qkv, self.proj) for kind in ("weight", "bias")]

    def within(self, prefix: str) -> Heads:
        """Return the heads of a model that has this one's as a part.

        Args:
            prefix: name of the part, with a dot behind.
        """
        return replace(
            self,
            name=prefix + self.name,
            qkv=prefix + self.qkv,
            proj=prefix + self.proj,
            positions=tuple(prefix + position for position in self.positions),
        )
