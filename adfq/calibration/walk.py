"""A network taken through its calibration images part by part, so that only the part at hand holds activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from adfq.calibration.images import CalibrationImages
from adfq.calibration.waiting import Waiting, WaitingRoom
from adfq.layers import QuantWeightLayer
from adfq.sites import Network

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Enough(BaseException):
    """The end of a forward pass that has shown what it was run for.

    No Exception, since a model could catch that.
    """


@dataclass(frozen=True)
class Part:
    """A part of a network that runs by itself, batch after batch.

    Attributes:
        name: name of the module; ``""`` for the network as a whole.
        sizes: number of images in each batch.
        run: function from the index of a batch to the output.
        own: the module itself and its arguments, batch by batch; None, the default, for the network as a whole.
    """

    name: str
    sizes: Sequence[int]
    run: Callable[[int], Any]
    own: tuple[nn.Module, Sequence[Call] | Calls] | None = None

    def calls(self, module: nn.Module, limits: Iterable[nn.Module] = ()) -> Iterator[Call]:
        """Yield the arguments that a module inside, or the part's own, gets for each batch; the pass ends there.

        A batch that does not get there has none.

        Args:
            module: a module that runs once in each pass.
            limits: modules where a pass ends too; none by default.
        """
        for batch in range(len(self.sizes)):
            if self.own is not None and module is self.own[0]:
                yield self.own[1][batch]
                continue
            found: list[Call] = []
            hooks = [limit.register_forward_pre_hook(_stop) for limit in limits]
            hooks.append(module.register_forward_pre_hook(partial(_take, found), with_kwargs=True))
            try:
                self.run(batch)
            except Enough:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
            if found:
                yield found[0]


def _take(found: list[Call], module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    found.append((arguments, keywords))
    raise Enough


def _stop(*_: Any) -> None:
    raise Enough


class Calls:
    """The arguments of a module in each batch, whose tensors wait in a file where there are several batches.

    Args:
        calls: arguments, batch by batch.
        sizes: number of images in each batch.
        folder: folder of the file; None for the system's temporary one.
    """

    def __init__(self, calls: Iterator[Call], sizes: Sequence[int], folder: Path | None) -> None:
        self.sizes = sizes
        keep = partial(_keep, WaitingRoom(folder)) if len(sizes) > 1 else _detach
        self._kept: list[Call] = []
        for call in calls:
            self._kept.append(tree_map(keep, call))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, batch: int) -> Call:
        call: Call = tree_map(_load, self._kept[batch])
        return call

    def part(self, name: str, module: nn.Module) -> Part:
        """Return the module as a part of its network.

        Args:
            name: name of the module.
            module: the module.
        """

        def run(batch: int) -> Any:
            arguments, keywords = self[batch]
            return module.forward(*arguments, **keywords)  # hooks before it have had their effect on these

        return Part(name, self.sizes, run, (module, self))


def _keep(room: WaitingRoom, leaf: Any) -> Any:
    return room.keep(leaf) if isinstance(leaf, Tensor) else leaf


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _load(leaf: Any) -> Any:
    return leaf.load() if isinstance(leaf, (Waiting, _Unknown)) else leaf


@dataclass(frozen=True)
class _Unknown:
    """The place of a tensor that is not computed."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def load(self) -> Tensor:
        return torch.full([1] * len(self.shape), torch.nan, dtype=self.dtype, device=self.device).expand(self.shape)


def unknown_like(x: Tensor) -> Tensor:
    """Return NaN in the shape of a tensor, in no memory: the mark of values that are not known yet.

    Whatever is computed from it is marked too.

    Args:
        x: floating-point tensor of any shape.
    """
    return _Unknown(x.shape, x.dtype, x.device).load()


class Walk:
    """One version of a network, quantized or in full precision, on its way through its trunk.

    At every step only the inputs of one module of the trunk are kept, for all images. The modules before it do not run
    again: in their places stand outputs of the right shape, which are unknown (NaN) unless later parts read them
    (`Network.trunk_outputs`).

    Args:
        network: the network, whose quantizers may change during the walk.
        images: calibration images; their ``folder`` is that of what waits.
        full_precision: True to walk without quantizers; False by default.
    """

    def __init__(self, network: Network, images: CalibrationImages, full_precision: bool = False) -> None:
        self.network, self.images, self.folder = network, images, images.folder
        self.mode = network.full_precision if full_precision else nullcontext
        self._trunk = [network.model.get_submodule(name) for name in network.trunk]
        self._calls: Calls | None = None  # calls of the module at hand
        self._behind = 0  # number of modules before it
        self._outputs: list[list[Any]] = []  # outputs of the modules behind, by batch
        self._keep = partial(_keep, WaitingRoom(self.folder)) if len(images.sizes) > 1 else _detach

    def parts(self) -> Iterator[Part]:
        """Yield the modules of the trunk, and at last the network as a whole, each when those before it are done."""
        sizes = self.images.sizes
        for index, (name, module) in enumerate(zip(self.network.trunk, self._trunk, strict=True)):
            with self.mode(), torch.no_grad():
                calls = Calls(self._whole(index).calls(module), sizes, self.folder)
            if len(calls) < len(sizes):
                raise RuntimeError(f"{name} is in the trunk, but not every image goes through it")
            self._calls, self._behind = calls, index
            self._outputs.append([])
            yield calls.part(name, module)
        if self._trunk:
            with self.mode(), torch.no_grad():
                for batch in range(len(sizes)):
                    self._output(len(self._trunk) - 1, self._trunk[-1].forward, batch, [])
        self._calls, self._behind = None, len(self._trunk)
        yield self._whole(len(self._trunk))

    def rest(self, module: nn.Module) -> Callable[[int, Tensor], Any]:
        """Return the network from a module on: a function from the index of a batch and the module's output.

        It serves as long as the part at hand does, and in the walk's mode.

        Args:
            module: the part at hand, or a module inside that runs once in each pass.
        """
        behind, calls = self._behind, self._calls

        def run(batch: int, output: Tensor) -> Any:
            used: list[int] = []
            with self.mode(), ExitStack() as stack:
                self._leave_out(behind, batch, used, stack)
                if calls is not None and (here := self._trunk[behind]) is not module:
                    arguments, keywords = calls[batch]
                    known = partial(here.forward, *arguments, **keywords)
                    stack.enter_context(replaced_forward(here, lambda *_, **__: known()))
                stack.enter_context(replaced_forward(module, lambda *_, **__: output))
                return self.network.run(self.images[batch])

        return run

    def feature(self, module: nn.Module) -> Callable[[int, int, Tensor], Tensor | None] | None:
        """Return the network from a module on, up to the feature that its classifier reads.

        The images may be any, since later modules depend on the module's output alone. The feature is the input of the
        head, or of all heads side by side. Without a head it is the network's output, or None unless that is a tensor.

        Args:
            module: a module of the network.

        Returns:
            Function from the index of a batch with such images, the number of images and the module's output for these
            to the feature (B×…). None for a module that is not the part at hand, or whose output is not all that later
            modules depend on.
        """
        if self._calls is None or self._trunk[self._behind] is not module or self.network.trunk_outputs:
            return None
        layers = (self.network.model.get_submodule(name) for name in self.network.units)
        heads = [layer for layer in layers if isinstance(layer, QuantWeightLayer) and layer.role == "head"]
        behind, samples = self._behind, dict[int, Tensor]()

        def run(batch: int, count: int, output: Tensor) -> Tensor | None:
            if batch not in samples:
                samples[batch] = self.images[batch][:1]
            found: list[Tensor] = []

            def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found.append(inputs[0])
                if len(found) == len(heads):
                    raise Enough

            with self.mode(), ExitStack() as stack:
                self._leave_out(behind, batch, [], stack)
                stack.enter_context(replaced_forward(module, lambda *_, **__: output))
                for head in heads:
                    stack.callback(head.register_forward_pre_hook(take).remove)
                try:
                    result = self.network.run(samples[batch].expand(count, -1, -1, -1))
                except Enough:
                    return torch.cat(found, -1)
            return result if isinstance(result, Tensor) and len(result) == count and not heads else None

        return run

    def _whole(self, behind: int) -> Part:
        """Return the network as a part, without so many modules of the trunk."""

        def run(batch: int) -> Any:
            used: list[int] = []
            with ExitStack() as stack:
                self._leave_out(behind, batch, used, stack)
                return self.network.run(self.images[batch])

        return Part("", self.images.sizes, run)

    def _leave_out(self, behind: int, batch: int, used: list[int], stack: ExitStack) -> None:
        """Put outputs in the place of so many modules of the trunk, until the stack is left."""
        for index, module in enumerate(self._trunk[:behind]):
            output = partial(self._output, index, module.forward, batch, used)
            stack.enter_context(replaced_forward(module, lambda *_, output=output, **__: output()))

    def _output(self, index: int, forward: Callable[..., Any], batch: int, used: list[int]) -> Any:
        """Return the output of a module that is behind: what is left of it, or the whole of it for the first time."""
        if index in used:
            raise RuntimeError(f"{self.network.trunk[index]} is in the trunk, but runs more than once")
        used.append(index)
        known = self._outputs[index]
        if batch < len(known):
            return tree_map(_load, known[batch])
        assert self._calls is not None
        arguments, keywords = self._calls[batch]
        output = forward(*arguments, **keywords)
        last = index == len(self._trunk) - 1
        read_later = last or self.network.trunk[index] in self.network.trunk_outputs
        known.append(tree_map(self._keep if read_later else _forget, output))
        return output


def with_checked_trunk(network: Network, images: CalibrationImages) -> Network:
    """Return the network without its trunk unless that is one, as one image shows in full precision.

    A subclass of a supported model may use a block twice, or read outputs of blocks before the last.

    Args:
        network: network, whose quantizers need no range yet.
        images: calibration images.
    """
    walk = Walk(network, CalibrationImages([next(images.one_of_each_shape())]), full_precision=True)
    try:
        for part in walk.parts():
            with walk.mode(), torch.no_grad():
                values = part.own[1][0] if part.own else part.run(0)
            if _holds_nan(values):
                return replace(network, trunk=())
    except Exception:  # whatever a model does with outputs that are not what it computed
        return replace(network, trunk=())
    return network


def _holds_nan(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in tree_leaves(tree))


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward function inside the block.

    Args:
        module: any module.
        forward: function that is called in the place of the module's own.
    """
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _forget(leaf: Any) -> Any:
    known = not isinstance(leaf, Tensor) or not leaf.is_floating_point()
    return leaf if known else _Unknown(leaf.shape, leaf.dtype, leaf.device)
