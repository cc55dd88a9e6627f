"""Early stopping: a stretch of training that ends when it no longer helps, and what is kept of it.

The stretch is cut into parts, and after each the network is judged. When it has not been better
than before for a while, training stops, and network and optimizer go back to where they were best:
as if training had ended there. All ranks judge the same network by the same numbers, so all stop at
the same step, whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gbp_ray.weights import tensor_state

__all__ = ["Stretch", "train_until_stale"]

Judgement = tuple[float, float]
"""(accuracy, loss) on examples that are not trained on."""


@dataclass(frozen=True)
class Stretch:
    """What became of a stretch of training.

    Attributes:
        kept_step: Steps after which the network is that was kept; 0 is the start.
        judgement: Of that network.
        train_loss: Of the last part that was trained; NaN where none was.
    """

    kept_step: int
    judgement: Judgement
    train_loss: float


def train_until_stale(
    model: nn.Module,
    optimizer: Optimizer,
    steps: range,
    *,
    every: int,
    patience: int,
    train: Callable[[range], float],
    judge: Callable[[], Judgement],
    start: Judgement,
) -> Stretch:
    """Trains until `patience` judgements in a row brought nothing better, or to the end.

    Better is more accurate, and of equals with less loss.

    Args:
        steps: Of the whole stretch.
        every: Steps from one judgement to the next; the end of the stretch is judged, too.
        train: Takes some steps, and returns their training loss.
        judge: Measures the network as it is.
        start: The judgement before the first step.
    """
    best, kept_step, kept = start, 0, _Snapshot(model, optimizer)
    stale, done, train_loss = 0, 0, math.nan
    while done < len(steps) and stale < patience:
        part = steps[done : done + every]
        train_loss = train(part)
        done += len(part)
        found = judge()
        if (found[0], -found[1]) > (best[0], -best[1]):
            best, kept_step, stale = found, done, 0
            kept = _Snapshot(model, optimizer)
        else:
            stale += 1
    if kept_step < done:
        kept.restore()
    return Stretch(kept_step, best, train_loss)


class _Snapshot:
    """A network and its optimizer's state, to go back to; of a sharded one this rank's rows."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._tensors = {name: t.detach().clone() for name, t in tensor_state(model).items()}
        self._state = {
            parameter: {key: _copy(value) for key, value in state.items()}
            for parameter, state in optimizer.state.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        for name, tensor in tensor_state(self._model).items():
            tensor.copy_(self._tensors[name])
        self._optimizer.state.clear()
        for parameter, state in self._state.items():
            self._optimizer.state[parameter] = state


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
