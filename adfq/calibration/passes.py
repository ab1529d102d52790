"""Calibration of a part of a network in several passes over its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from adfq.calibration.unknown import Trace
from adfq.calibration.waiting import Waiting, WaitingRoom
from adfq.calibration.walk import Enough, Part, unknown_like
from adfq.errors import AdfqError, NonFiniteError
from adfq.quantizers import Quantizer
from adfq.statistics import Statistic

#: Most bytes of a site's inputs that wait in a file for the next pass; else the part computes them once more.
_KEPT = 2**32


class _Collector(nn.Module):
    """The stand-in of a quantizer whose range is being searched, which shows its inputs to a statistic.

    Its output is unknown (NaN): a site behind it sees that, and waits for a later pass. Inputs are kept in a file for
    the next statistics, which takes less time than computing them again.

    Args:
        site: name of the quantizer's site.
        quantizer: the quantizer.
        met: called when an input was shown to the statistic.
        folder: folder of the file; None for the system's temporary one.
    """

    statistic: Statistic | None

    def __init__(self, site: str, quantizer: Quantizer, met: Callable[[], None], folder: Path | None) -> None:
        super().__init__()
        self.site, self.met, self.folder = site, met, folder
        self.quantizer = [quantizer]  # in a list, no submodule
        self.room: WaitingRoom | None = None
        self.restart()
        self.begin(1.0, None)

    def restart(self) -> None:
        """Forget the inputs so far."""
        self.observe, self.search = self.quantizer[0].observe, self.quantizer[0].search()
        self.kept: list[tuple[Waiting, float]] | None = []
        self.advance()

    def begin(self, share: float, trace: Trace | None) -> None:
        """Prepare for a batch with a share of all images; what is unknown is NaN, or in the trace if there is one."""
        self.share, self.trace, self.reached, self.met_here = share, trace, False, False

    def end(self, cut_off: bool) -> None:
        """Note whether the batch should have been seen, if not now then in a later pass."""
        self.missed |= not self.met_here and (self.reached or cut_off)

    def forward(self, x: Tensor) -> Tensor:
        """Show an input to the statistic, unless it depends on another site's unknown output; return NaN."""
        if self.statistic is not None and not self.reached and x.numel():
            self.reached = True  # a layer that is used several times is calibrated on the first use
            if not torch.isnan(x.amax()) if self.trace is None else x not in self.trace:
                with naming(self.site):
                    self.observe(self.statistic, x, self.share)
                self._keep(x)
                self.seen = self.met_here = True
                self.met()
        return unknown_like(x) if self.trace is None else self.trace.mark(unknown_like(x))

    def _keep(self, x: Tensor) -> None:
        if x.nbytes > self.share * _KEPT:
            self.kept = None
        if self.kept is not None:
            self.room = self.room or WaitingRoom(self.folder)
            self.kept.append((self.room.keep(x), self.share))

    def finish(self) -> None:
        """Show kept inputs to further statistics, as far as there are any."""
        self.advance()
        while self.statistic is not None and self.kept:
            with naming(self.site):
                for x, share in self.kept:
                    self.observe(self.statistic, x.load(), share)
            self.advance()

    def advance(self) -> None:
        """Set the next statistic; None means that the quantizer is calibrated."""
        with naming(self.site):
            self.statistic = next(self.search, None)
        self.seen = self.missed = False


@torch.no_grad()
def calibrate_part(
    model: nn.Module,
    part: Part,
    quantizers: Mapping[str, Quantizer],
    folder: Path | None,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Calibrate a part's quantizers, those that do not depend on one another in the same pass.

    A quantizer sees its site's input as the already quantized layers before it compute it.

    Args:
        model: model with the part.
        part: part of a network.
        quantizers: quantizers that are not calibrated, by the name of their site.
        folder: folder for inputs that wait; None for the system's temporary one.
        done: called after each calibration; nothing by default.

    Raises:
        AdfqError: for a site that the model does not use; the message names it.
        NonFiniteError: for activations that hold NaN or infinity; the message names the site.
    """
    passes = _Passes(part, quantizers, folder)
    try:
        for collector in passes.waiting:
            model.set_submodule(collector.site, collector)
        while passes.waiting:
            passes.run()
            for site in passes.settle():
                model.set_submodule(site, quantizers[site])
                done()
    finally:
        for collector in passes.waiting:
            model.set_submodule(collector.site, quantizers[collector.site])


class _Passes:
    def __init__(self, part: Part, quantizers: Mapping[str, Quantizer], folder: Path | None) -> None:
        self.part = part
        self.waiting = [_Collector(site, quantizer, self._count, folder) for site, quantizer in quantizers.items()]
        self.sought: int | None = None  # number of sites that a batch is run for; None if it is not known yet
        self.met = 0

    def _count(self) -> None:
        self.met += 1
        if self.met == self.sought:
            raise Enough

    def run(self) -> None:
        """Take all batches through the part, each as far as there is something to see."""
        images = sum(self.part.sizes)
        for batch, size in enumerate(self.part.sizes):
            self.met = 0
            # The network as a whole may do anything, and something else for each batch; its trunk and units do not.
            trace = None if self.part.name else Trace()
            for collector in self.waiting:
                collector.begin(size / images, trace)
            cut_off = self._run(batch, trace)
            for collector in self.waiting:
                collector.end(cut_off)
            if trace is None:
                if not self.met:
                    self._refuse()
                self.sought = self.sought or self.met
        if not any(collector.seen for collector in self.waiting):
            self._refuse()

    def _run(self, batch: int, trace: Trace | None) -> bool:
        """Take a batch through the part, and return True if the pass ended where a value is not known yet."""
        try:
            with nullcontext() if trace is None else trace:
                self.part.run(batch)
        except Enough:
            return trace is not None
        except AdfqError:
            raise
        except Exception:  # code behind a site may fail on values that are not known yet
            if not self.met or self.sought is not None:
                raise
            return True
        return False

    def _refuse(self) -> None:
        for collector in self.waiting:
            if collector.reached:
                raise NonFiniteError(
                    f"{collector.site}: cannot calibrate on values that are not finite (NaN or infinity)"
                )
        name = self.waiting[0].site
        raise AdfqError(f"{name} saw no calibration data: the model does not use this layer")

    def settle(self) -> list[str]:
        """Let the sites that have seen all their data go on, and return those that are calibrated by that."""
        if all(collector.missed for collector in self.waiting if collector.seen):
            raise AdfqError(
                f"{self.waiting[0].site}: the model uses its layers in another order in each batch; calibrate it on "
                "one batch"
            )
        for collector in self.waiting:
            if collector.seen and collector.missed:
                collector.restart()
            elif collector.seen:
                collector.finish()
            collector.missed = False
        found = [collector.site for collector in self.waiting if collector.statistic is None]
        if found:
            self.waiting = [collector for collector in self.waiting if collector.statistic is not None]
            self.sought = None  # more sites see data from now on
        return found


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a site or layer before the message of an AdfqError from the block.

    Args:
        name: name of the site or layer.
    """
    try:
        yield
    except AdfqError as error:
        raise type(error)(f"{name}: {error}") from None


@contextmanager
def pinned(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """Make quantizers depend on all calibration images inside the block, and not on the batch at hand.

    Args:
        quantizers: quantizers, calibrated or not.
    """
    quantizers = list(quantizers)
    for quantizer in quantizers:
        quantizer.pinned = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.pinned = False
