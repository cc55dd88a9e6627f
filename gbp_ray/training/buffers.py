"""The buffers of a network in training: what its forward passes write, the same on any W.

Each part of a batch starts from the same values, whichever rank computes it. A step of one part
leaves every buffer as that part did. The effects of several parts are joined:

    floating point            moves by the mean of the parts' changes, as running statistics do
    int64 scalar, a counter   grows by one if each part counts one (batches), else by the parts' sum
                              (examples); that of a norm always by one
    everything else           is what the last part made of it: flags, pointers, queues of numbers

What would be NaN or infinite by a mean (an observer that begins at infinity) follows the last part,
too, and so do the floating-point buffers of a module of which a flag or a pointer changed: they
belong together. A value that does not change keeps its bits.

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

__all__ = [
    "TrainedBuffers",
]


class TrainedBuffers:
    """The buffers of a model over the parts of a step.

    Attributes:
        size: B, the length of what `collect` gives.
        dtype: In which it is exact.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._slots = buffer_slots(model)
        self._names = {id(buffer): name for name, buffer in model.named_buffers()}
        buffers = list({id(buffer): buffer for _, _, buffer in self._slots}.values())
        self._floating = [b for b in buffers if b.is_floating_point()]
        self._counters = [b for b in buffers if b.ndim == 0 and b.dtype is torch.int64]
        sorted_out = {id(b) for b in (*self._floating, *self._counters)}
        self._others = [b for b in buffers if id(b) not in sorted_out]
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
        self._num_parts = 0
        self.size = sum(b.numel() for b in self._floating)
        self.size += len(self._counters) + len(self._others)
        kinds = (tensor.dtype.to_real() for tensor in (*self._floating, *model.parameters()))
        self.dtype = reduce(torch.promote_types, kinds, torch.float32)

    def remember(self, num_parts: int) -> None:
        """Notes what all parts of the coming step start from."""
        self._before = [b.clone() for b in self._all]
        self._last, self._growth, self._num_parts = None, {}, num_parts

    @torch.no_grad()
    def collect(self, part: int) -> Tensor:
        """Returns (B,) what the pass of a part changed, and undoes it.

        Where that cannot be joined by a mean, the element is NaN.

        Raises:
            PruneError: A buffer has another shape than before.
        """
        for owner, name, buffer in self._slots:
            found, owner[name] = owner[name], buffer
            if found is not None and found is not buffer and found.shape == buffer.shape:
                buffer.copy_(found)
        self._refuse_new_shapes()
        before = dict(zip(map(id, self._all), self._before, strict=True))
        pieces = [torch.zeros(0, device=self._device)]
        for buffer in self._floating:
            if self._is_exact(buffer):
                pieces.append(buffer.reshape(-1))
                continue
            # Infinity minus itself is NaN, and attention masks hold infinities.
            is_same = buffer == before[id(buffer)]
            pieces.append((buffer - before[id(buffer)]).masked_fill(is_same, 0).reshape(-1))
        if self._counters:
            grown = torch.stack(self._counters) - torch.stack(
                [before[id(c)] for c in self._counters]
            )
            self._growth[part] = grown
            counted = torch.where((grown == 0) | (grown == 1), grown, math.nan)
            if self._num_parts > 1:
                counted = torch.where(self._is_norm, (grown != 0).to(counted), counted)
            pieces.append(counted)
        for other in self._others:
            is_changed = (other != before[id(other)]).any().view(1)
            pieces.append(torch.where(is_changed, math.nan, 0.0))
        joined_B = torch.cat(pieces)
        if part == self._num_parts - 1:
            self._last = [b.clone() for b in self._all]
        self._restore()
        return joined_B

    @torch.no_grad()
    def settle(self, joined_B: Tensor, ranks: Ranks) -> None:
        """Gives all buffers the values that they have after the step. Communicates where it must.

        Args:
            joined_B: Mean over the parts of what was collected, the same on every rank.
        """
        self._restore()
        pieces = joined_B.split([b.numel() if b.is_floating_point() else 1 for b in self._all])
        # Looked at once, as on a GPU every look waits for it.
        is_plain = self.size == 0 or bool(torch.isfinite(joined_B).all())
        odd = [] if is_plain else self._find_odd(pieces)
        for number, (buffer, piece) in enumerate(zip(self._all, pieces, strict=True)):
            if number in odd:
                continue
            found = piece.view_as(buffer) if buffer.is_floating_point() else piece.view(())
            if not buffer.is_floating_point():
                if number < len(self._floating) + len(self._counters):
                    buffer += found > 0
            elif self._is_exact(buffer):
                buffer.copy_(torch.where(found == buffer, buffer, found))
            else:
                # -0.0 plus 0.0 would lose its sign.
                buffer.copy_(torch.where(found == 0, buffer, buffer + found))
        if odd:
            self._follow(odd, ranks)

    def _is_exact(self, buffer: Tensor) -> bool:
        # Before plus change may round to a neighbour of what the part left; the statistics of norms
        # have always been rounded so, and results that are stored depend on it.
        return self._num_parts == 1 and id(buffer) not in self._of_norms

    def _find_odd(self, pieces: tuple[Tensor, ...]) -> list[int]:
        """Lists the buffers, by number, that no mean describes."""
        odd = {
            number
            for number, (buffer, piece) in enumerate(zip(self._all, pieces, strict=True))
            if not (buffer.is_floating_point() and self._is_exact(buffer))
            and not bool(torch.isfinite(piece).all())
        }
        others = {id(buffer) for buffer in self._others}
        changed = {id(self._all[number]) for number in odd} & others
        owners = {id(owner) for owner, _, buffer in self._slots if id(buffer) in changed}
        mates = {id(buffer) for owner, _, buffer in self._slots if id(owner) in owners}
        for number, buffer in enumerate(self._floating):
            if id(buffer) in mates and not self._is_exact(buffer):
                odd.add(number)
        return sorted(odd)

    def _follow(self, odd: list[int], ranks: Ranks) -> None:
        first = len(self._floating)
        counters = range(first, first + len(self._counters))
        kept = self._last or []
        last = {n: kept[n].cpu() for n in odd if kept and n not in counters}
        growth = {part: grown.tolist() for part, grown in self._growth.items()}
        values: dict[int, Tensor] = {}
        by_part: dict[int, list[int]] = {}
        for others_last, others_growth in ranks.all_gather_objects((last, growth)):
            values |= others_last
            by_part |= others_growth
        for number in odd:
            if number in counters:
                self._all[number] += sum(grown[number - first] for grown in by_part.values())
            else:
                self._all[number].copy_(values[number])

    def _restore(self) -> None:
        for buffer, before in zip(self._all, self._before, strict=True):
            buffer.copy_(before)

    def _refuse_new_shapes(self) -> None:
        for buffer, before in zip(self._all, self._before, strict=True):
            if buffer.shape != before.shape:
                raise PruneError(
                    f"buffer '{self._names[id(buffer)]}' has shape {tuple(buffer.shape)} after a "
                    f"forward pass and {tuple(before.shape)} before it; give it its shape in "
                    "build_model, as by calling the network on one batch there"
                )
