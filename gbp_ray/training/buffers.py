"""The buffers of a network in training, which its forward passes write, the same on any rank count.

Each microbatch starts from the same values, whichever rank computes it. A step of one microbatch
leaves every buffer as that one did. The effects of several are combined:

    floating point            changes by the mean of their changes, as running statistics do
    int64 scalar, a counter   grows by one if each microbatch adds one (batches), else by their sum
                              (examples); that of a norm always by one
    everything else           as the last microbatch left it: flags, pointers, queues of numbers

A buffer whose mean would be NaN or infinite (an observer that begins at infinity) is left as by the
last microbatch, too, and so are the floating-point buffers of a module of which a flag or a pointer
changed: they belong together. A value that does not change keeps its bits.

Shape suffixes: B = elements of the floating-point buffers, then one for each other buffer.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gbp_ray.distributed.ranks import Ranks, buffer_slots
from gbp_ray.errors import PruneError

__all__ = ["TrainedBuffers"]


class TrainedBuffers:
    """The buffers of a model over the microbatches of a step.

    Attributes:
        size: B.
        dtype: In which `collect` is exact.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._slots = buffer_slots(model)
        self._names = {id(buffer): name for name, buffer in model.named_buffers()}
        buffers = list({id(buffer): buffer for _, _, buffer in self._slots}.values())
        self._floating = [b for b in buffers if b.is_floating_point()]
        self._counters = [b for b in buffers if b.ndim == 0 and b.dtype is torch.int64]
        known = {id(b) for b in (*self._floating, *self._counters)}
        self._others = [b for b in buffers if id(b) not in known]
        self._all = [*self._floating, *self._counters, *self._others]
        norms = (module for module in model.modules() if isinstance(module, _NormBase))
        self._of_norms = {id(b) for norm in norms for b in norm._buffers.values()}
        self._is_norm = torch.tensor(
            [id(counter) in self._of_norms for counter in self._counters], device=device
        )
        self._device = device
        self._before: list[Tensor] = []
        self._last: list[Tensor] | None = None
        self._growth: dict[int, Tensor] = {}
        self._num_microbatches = 0
        self.size = sum(b.numel() for b in self._floating)
        self.size += len(self._counters) + len(self._others)
        kinds = (tensor.dtype.to_real() for tensor in (*self._floating, *model.parameters()))
        self.dtype = reduce(torch.promote_types, kinds, torch.float32)

    def remember(self, num_microbatches: int) -> None:
        """Saves the values that all microbatches of the next step start from."""
        self._before = [b.clone() for b in self._all]
        self._last, self._growth, self._num_microbatches = None, {}, num_microbatches

    @torch.no_grad()
    def collect(self, microbatch: int) -> Tensor:
        """Returns the changes by a microbatch's forward pass, (B,), and undoes them.

        An element is NaN where a mean cannot combine the changes.

        Raises:
            PruneError: A buffer has another shape than before.
        """
        for owner, name, buffer in self._slots:
            found, owner[name] = owner[name], buffer
            if found is not None and found is not buffer and found.shape == buffer.shape:
                buffer.copy_(found)
        for buffer, old in zip(self._all, self._before, strict=True):
            if buffer.shape != old.shape:
                raise PruneError(
                    f"buffer '{self._names[id(buffer)]}' has shape {tuple(buffer.shape)} after a "
                    f"forward pass and {tuple(old.shape)} before it; give it its shape in "
                    "build_model, as by calling the network on one batch there"
                )
        before = dict(zip(map(id, self._all), self._before, strict=True))
        deltas = [torch.zeros(0, device=self._device)]
        for buffer in self._floating:
            if self._is_exact(buffer):
                deltas.append(buffer.reshape(-1))
                continue
            # Infinity minus itself is NaN, and attention masks hold infinities.
            is_same = buffer == before[id(buffer)]
            deltas.append((buffer - before[id(buffer)]).masked_fill(is_same, 0).reshape(-1))
        if self._counters:
            grown = torch.stack(self._counters) - torch.stack(
                [before[id(c)] for c in self._counters]
            )
            self._growth[microbatch] = grown
            counted = torch.where((grown == 0) | (grown == 1), grown, math.nan)
            if self._num_microbatches > 1:
                counted = torch.where(self._is_norm, (grown != 0).to(counted), counted)
            deltas.append(counted)
        for other in self._others:
            is_changed = (other != before[id(other)]).any().view(1)
            deltas.append(torch.where(is_changed, math.nan, 0.0))
        delta_B = torch.cat(deltas)
        if microbatch == self._num_microbatches - 1:
            self._last = [b.clone() for b in self._all]
        self._restore()
        return delta_B

    @torch.no_grad()
    def settle(self, delta_B: Tensor, ranks: Ranks) -> None:
        """Gives all buffers their values after the step. Communicates where it must.

        Args:
            delta_B: Mean of the collected changes over the microbatches, the same on every rank.
        """
        self._restore()
        deltas = delta_B.split([b.numel() if b.is_floating_point() else 1 for b in self._all])
        # Read once, as on a GPU each read waits for it.
        is_plain = self.size == 0 or bool(torch.isfinite(delta_B).all())
        odd = [] if is_plain else self._find_odd(deltas)
        for number, (buffer, delta) in enumerate(zip(self._all, deltas, strict=True)):
            if number in odd:
                continue
            found = delta.view_as(buffer) if buffer.is_floating_point() else delta.view(())
            if not buffer.is_floating_point():
                if number < len(self._floating) + len(self._counters):
                    buffer += found > 0
            elif self._is_exact(buffer):
                buffer.copy_(torch.where(found == buffer, buffer, found))
            else:
                # -0.0 plus 0.0 would lose its sign.
                buffer.copy_(torch.where(found == 0, buffer, buffer + found))
        if odd:
            self._copy_last(odd, ranks)

    def _is_exact(self, buffer: Tensor) -> bool:
        # Old value plus change may round to a neighbour of the new value. Statistics of norms have
        # always been rounded so, and stored results depend on it.
        return self._num_microbatches == 1 and id(buffer) not in self._of_norms

    def _find_odd(self, deltas: tuple[Tensor, ...]) -> list[int]:
        """Lists the buffers, by number, that a mean cannot combine."""
        odd = {
            number
            for number, (buffer, delta) in enumerate(zip(self._all, deltas, strict=True))
            if not (buffer.is_floating_point() and self._is_exact(buffer))
            and not bool(torch.isfinite(delta).all())
        }
        others = {id(buffer) for buffer in self._others}
        changed = {id(self._all[number]) for number in odd} & others
        owners = {id(owner) for owner, _, buffer in self._slots if id(buffer) in changed}
        mates = {id(buffer) for owner, _, buffer in self._slots if id(owner) in owners}
        for number, buffer in enumerate(self._floating):
            if id(buffer) in mates and not self._is_exact(buffer):
                odd.add(number)
        return sorted(odd)

    def _copy_last(self, odd: list[int], ranks: Ranks) -> None:
        first = len(self._floating)
        counters = range(first, first + len(self._counters))
        kept = self._last or []
        last = {n: kept[n].cpu() for n in odd if kept and n not in counters}
        growth = {number: grown.tolist() for number, grown in self._growth.items()}
        values: dict[int, Tensor] = {}
        by_microbatch: dict[int, list[int]] = {}
        for others_last, others_growth in ranks.all_gather_objects((last, growth)):
            values |= others_last
            by_microbatch |= others_growth
        for number in odd:
            if number in counters:
                self._all[number] += sum(grown[number - first] for grown in by_microbatch.values())
            else:
                self._all[number].copy_(values[number])

    def _restore(self) -> None:
        for buffer, before in zip(self._all, self._before, strict=True):
            buffer.copy_(before)
