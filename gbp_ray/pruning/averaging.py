"""An exponential moving average of the weights, which becomes the network when a training ends.

The average begins anew with each training (pretrain, or the fine-tuning of a round), at the weights
that it begins with. After the last step it takes the place of the weights, and before that wherever
the training is judged (early stopping), to go on from the weights themselves. So one network is
evaluated, stored, scored for the next decision and trained on: a mask decided on weights that
nobody keeps would be another network's. So a round's files say all that the next one needs, and a
resumed trial has nothing more to read. Pruned weights are zero in every term, and so are they in
the average.

A short training would hardly leave its start behind, so the decay of step t is at most
(1 + t) / (10 + t). Running statistics are averaged alike, counters are those of the last step.

Each rank averages what it holds, element by element: the same bits in shards and in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gbp_ray.pruning.sharding import local

__all__ = ["MovingAverage"]


class MovingAverage:
    """The average of a model's trainable parameters and of its floating-point buffers.

    Args:
        decay: What a step keeps of the average, at most.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._num_steps = 0
        averaged = [local(p.detach()) for p in model.parameters() if p.requires_grad]
        averaged += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._pairs: list[tuple[Tensor, Tensor]] = [(now, now.clone()) for now in averaged]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after a step into the average."""
        self._num_steps += 1
        decay = min(self._decay, (1 + self._num_steps) / (10 + self._num_steps))
        for now, average in self._pairs:
            # Each operation rounds by itself: a fused one would depend on where a shard ends.
            moved = average + (now - average) * (1 - decay)
            # Infinities, as masks of attention hold them, differ from themselves by NaN, and what
            # was infinite before the first step has no mean with what came after it.
            moved = torch.where(now == average, average, moved)
            average.copy_(torch.where(torch.isfinite(average), moved, now))

    @torch.no_grad()
    def trade_places(self) -> None:
        """Puts the average in the place of the weights, or these back in theirs."""
        for now, average in self._pairs:
            kept = now.clone()
            now.copy_(average)
            average.copy_(kept)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Has the weights in their place for the block, and the average outside it."""
        self.trade_places()
        try:
            yield
        finally:
            self.trade_places()
